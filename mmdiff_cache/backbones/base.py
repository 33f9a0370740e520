"""What stage one asks of a diffusion transformer; each family of models is one subclass."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mmdiff_cache.backbones.info import BackboneInfo
from mmdiff_cache.errors import BackboneError

__all__ = ["Backbone", "BackboneInfo", "BlockSlot", "PromptEmbeddings", "Sampler"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSlot:
    """One transformer block and its place in the model, where a tap is put around it."""

    block: nn.Module
    container: nn.ModuleList
    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEmbeddings:
    """Encoded prompts of a batch."""

    tokens: Float[Tensor, "B S E"]
    """One vector a text token, padding included: the model has no text mask."""
    pooled: Float[Tensor, "B E_pooled"]

    def repeat_each(self, times: int) -> "PromptEmbeddings":
        """Every prompt `times` in a row, for a batch with all timesteps of a sample side by side."""
        return PromptEmbeddings(
            tokens=self.tokens.repeat_interleave(times, dim=0),
            pooled=self.pooled.repeat_interleave(times, dim=0),
        )

    def followed_by(self, other: "PromptEmbeddings") -> "PromptEmbeddings":
        """These prompts, then others, as one batch."""
        return PromptEmbeddings(
            tokens=torch.cat((self.tokens, other.tokens)), pooled=torch.cat((self.pooled, other.pooled))
        )


@runtime_checkable
class Sampler(Protocol):
    """A scheduler of diffusers, as far as drawing a picture needs it."""

    config: Any
    num_inference_steps: int
    sigmas: Tensor
    """Noise level of every step, then that of the picture, 0."""
    timesteps: Tensor
    """The model's time at every step, up to 1000."""

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool
    ) -> tuple[Tensor, ...]:
        """The latent after one more step."""
        ...


class Backbone(ABC):
    """A frozen diffusion transformer with its VAE and text encoders, on one device."""

    info: BackboneInfo
    device: torch.device
    dtype: torch.dtype

    @property
    @abstractmethod
    def blocks(self) -> Mapping[str, BlockSlot]:
        """The loaded blocks by address, in the order in which they run."""

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """What decides the features, apart from the inputs: pipeline class, weights, dtype, quantisation."""

    @abstractmethod
    def encode_image(self, images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B c H_f W_f"]:
        """Clean latents in float32: the mode of the VAE's posterior, in the range the model expects."""

    @abstractmethod
    def decode_latent(self, latent: Float[Tensor, "B c H_f W_f"]) -> UInt8[Tensor, "B H W 3"]:
        """The picture of a clean latent, rounded to whole grey levels."""

    @abstractmethod
    def pack(self, latent: Float[Tensor, "B c H_f W_f"]) -> Float[Tensor, "B h w P"]:
        """The latent as the transformer's tokens."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Encode each prompt on its own, so that its embedding depends on no other."""

    @abstractmethod
    def forward(
        self,
        noised: Float[Tensor, "B c H_f W_f"],
        t: Float[Tensor, " B"],
        prompts: PromptEmbeddings,
        guidance: float | None,
    ) -> Float[Tensor, "B c H_f W_f"]:
        """One pass of the transformer at times t in [0, 1]; returns the velocity eps - x_0.

        The velocity means nothing when blocks were left out at loading. Raises BackboneError when a step
        cache, sharding or fused projections would change what the blocks see.
        """

    @property
    @abstractmethod
    def contrast_in_one_pass(self) -> bool:
        """Whether true classifier-free guidance is one pass of [negative, prompts], or a pass of each."""

    @abstractmethod
    def sampler(self, steps: int, resolution: int) -> Sampler:
        """The pipeline's own scheduler, new and set to so many steps as the pipeline would set it.

        Raises BackboneError for one that needs more than the latent and the velocity at each step.
        """

    @abstractmethod
    def sampler_time(self, sigma: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """A scheduler's noise level as the pipeline hands it to the model, rounding included, in [0, 1]."""

    def use_attention(self, name: str) -> None:
        """Compute attention by the named backend from now on.

        Raises ConfigError or BackboneError where that cannot be.
        """
        raise BackboneError(
            f"{self.info.name} has no choice of attention backends; leave out --attention {name}"
        )

    @abstractmethod
    def embed_concepts(self, words: Sequence[str]) -> Float[Tensor, "K C"]:
        """The tokens with which the concept stream starts, one a word. Paper: Sec. 3.2."""

    @abstractmethod
    def concept_modulation(self, t: Float[Tensor, " B"], guidance: float | None) -> Float[Tensor, "B C"]:
        """The conditioning of the concept stream: time and guidance, and no prompt."""
