"""From pictures to features: noise them, run the backbone once, read the blocks, take stock of the values."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float16, Float32
from numpy.typing import NDArray
from torch import Tensor

from mmdiff_cache.backbones.base import Backbone, PromptEmbeddings
from mmdiff_cache.backbones.flow_matching import add_noise, draw_batch
from mmdiff_cache.config import NoiseConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.extraction import concept_attention
from mmdiff_cache.extraction.host_copy import start_copy
from mmdiff_cache.extraction.profile import Profile
from mmdiff_cache.extraction.taps import capturing
from mmdiff_cache.records import STATISTICS, FeatureBatch, PreparedSample

FLOAT16_MAX = 65504.0
ENTROPY_BINS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    """One pass of the backbone over B samples, on its device."""

    latents: Float32[Tensor, "B h w P"]
    """Clean, before noising."""
    hidden_states: Float[Tensor, "B T L h w C"]
    """In the model's own dtype."""
    concept_scores: Mapping[str, Float32[Tensor, "B T block K h w"]]


class Extractor:
    """Captures the outputs of `layers` at `timesteps`, and the concept scores of `vocabularies`.

    All timesteps of a batch go through the transformer together. Features are bit-identical for the same
    batch; across batch sizes they agree to rounding.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Sequence[str],
        timesteps: Sequence[float],
        vocabularies: Mapping[str, Sequence[str]],
        noise: NoiseConfig,
        guidance: float | None,
        profile: Profile | None = None,
    ) -> None:
        backbone.info.check_layers(layers)
        for layer in layers:
            if layer not in backbone.blocks:
                raise ConfigError(f"layer {layer} was left out when {backbone.info.name} was loaded")
        self.backbone = backbone
        self.layers = tuple(layers)
        self.timesteps = tuple(timesteps)
        self.vocabularies = {name: tuple(words) for name, words in vocabularies.items()}
        self.profile = profile or Profile(on=False)
        self._noise = noise
        self._guidance = guidance
        self._concepts = {name: backbone.embed_concepts(words) for name, words in self.vocabularies.items()}

    def __call__(self, samples: Sequence[PreparedSample]) -> FeatureBatch:
        """Features of samples of one size. Values that are not finite do not raise: see `failures`."""
        return self.begin(samples)()

    @torch.inference_mode()
    def begin(self, samples: Sequence[PreparedSample]) -> Callable[[], FeatureBatch]:
        """Start a batch; call what it returns, from any thread, to wait for its features.

        On a GPU their copy to the CPU then goes on beside the next batch.
        """
        captured = self.capture(samples)
        mapped = [_block_index(block) for block in self.backbone.info.concept_blocks]
        with self.profile.timing("cast and audit", self.backbone.device):
            stored, audit = store_as_float16(captured.hidden_states)
            maps = {
                name: concept_attention.concept_maps(scores[:, :, mapped])
                for name, scores in captured.concept_scores.items()
            }
        tensors = {"hidden_states": stored[:, None], "latents": captured.latents, "audit": audit[:, None]}
        tensors |= {f"scores/{name}": scores[:, None] for name, scores in captured.concept_scores.items()}
        tensors |= {f"maps/{name}": values[:, None] for name, values in maps.items()}
        arrived = start_copy(tensors, self.backbone.device, self.profile)
        return lambda: _feature_batch(arrived(), self.vocabularies)

    @torch.inference_mode()
    def capture(self, samples: Sequence[PreparedSample]) -> Captured:
        """What the blocks put out, before it is cast for the store."""
        backbone, batch, steps = self.backbone, len(samples), len(self.timesteps)
        timing = self.profile.timing
        with timing("VAE", backbone.device):
            clean = backbone.encode_image(torch.from_numpy(np.stack([sample.image for sample in samples])))
        latents = backbone.pack(clean)
        times = torch.tensor(self.timesteps, device=clean.device)
        noise = draw_batch(self._noise, [s.sample_id for s in samples], steps, clean.shape[1:])
        noised = add_noise(clean, noise.to(clean.device), times, self._noise.form).flatten(0, 1)
        with timing("text", backbone.device):
            prompts = backbone.encode_prompts([sample.prompt for sample in samples]).repeat_each(steps)
        with timing("transformer", backbone.device):
            outputs, scores = self._run(noised, times.repeat(batch), prompts, math.prod(latents.shape[1:3]))
        height = latents.shape[1]
        return Captured(
            latents=latents,
            hidden_states=rearrange(outputs, "L (B T) (h w) C -> B T L h w C", B=batch, h=height),
            concept_scores={
                name: rearrange(blocks, "block (B T) K (h w) -> B T block K h w", B=batch, h=height)
                for name, blocks in scores.items()
            },
        )

    def _run(
        self,
        noised: Float[Tensor, "B c H_f W_f"],
        t: Float[Tensor, " B"],
        prompts: PromptEmbeddings,
        image_tokens: int,
    ) -> tuple[list[Float[Tensor, "B N C"]], dict[str, list[Float32[Tensor, "B K N"]]]]:
        """One forward pass: the output of every tapped block, and the scores of every double block."""
        blocks, text_tokens = self.backbone.blocks, prompts.tokens.shape[1]
        with ExitStack() as stack:
            streams: dict[str, concept_attention.ConceptStream] = {}
            if self._concepts:
                modulation = self.backbone.concept_modulation(t, self._guidance)
                reading = concept_attention.reading(blocks, self._concepts, modulation)
                streams = stack.enter_context(reading)
            taps = capturing(blocks, self.layers, text_tokens=text_tokens, image_tokens=image_tokens)
            outputs = stack.enter_context(taps)
            self.backbone.forward(noised, t, prompts, self._guidance)
        scores = {name: list(stream.scores.values()) for name, stream in streams.items()}
        return [outputs[layer] for layer in self.layers], scores


def _feature_batch(arrays: Mapping[str, NDArray[Any]], vocabularies: Iterable[str]) -> FeatureBatch:
    names = tuple(vocabularies)
    return FeatureBatch(
        hidden_states=arrays["hidden_states"],
        concept_scores={name: arrays[f"scores/{name}"] for name in names},
        concept_maps={name: arrays[f"maps/{name}"] for name in names},
        latents=arrays["latents"],
        audit=arrays["audit"],
    )


def store_as_float16(
    hidden_states: Float[Tensor, "B T L h w C"],
) -> tuple[Float16[Tensor, "B T L h w C"], Float32[Tensor, "B T L statistic"]]:
    """Values as they are stored, and the STATISTICS of each map before the cast.

    The clamp is done in float32: in bfloat16 the bound 65504 itself would round up to 65536, which float16
    takes for infinite.
    """
    values = hidden_states.to(torch.float32)
    stored = values.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)
    size, axes = values.abs(), (-3, -2, -1)
    finite = values.isfinite()
    statistics = {
        "mean": values.mean(dim=axes),
        "rms": values.square().mean(dim=axes).sqrt(),
        "max_abs": size.amax(dim=axes),
        "entropy": norm_entropy(values),
        "clipped": ((size > FLOAT16_MAX) & finite).sum(dim=axes),
        "flushed": ((stored == 0) & (values != 0)).sum(dim=axes),
        "non_finite": (~finite).sum(dim=axes),
    }
    return stored, torch.stack([statistics[name].to(torch.float32) for name in STATISTICS], dim=-1)


def norm_entropy(values: Float32[Tensor, "*maps h w C"]) -> Float32[Tensor, "*maps"]:
    """Entropy in nats of the histogram of a map's token norms, in 64 equal bins from 0 to their maximum.

    The last bin holds its upper edge. Zero for a map of zeros, NaN if a norm is not finite. Paper: Fig. 3b.
    """
    norms = values.flatten(-3, -2).norm(dim=-1)
    largest = norms.amax(dim=-1, keepdim=True)
    usable = largest.isfinite() & (largest > 0)
    place = torch.where(usable, norms / largest, 0.0) * ENTROPY_BINS
    bins = place.nan_to_num().to(torch.int64).clamp(max=ENTROPY_BINS - 1)
    counts = torch.zeros(*bins.shape[:-1], ENTROPY_BINS, device=values.device)
    shares = counts.scatter_add_(-1, bins, torch.ones_like(norms)) / norms.shape[-1]
    entropy = torch.special.entr(shares).sum(dim=-1)
    return torch.where(largest[..., 0].isfinite(), entropy, torch.nan)


def failures(features: FeatureBatch, layers: Sequence[str], timesteps: Sequence[float]) -> dict[int, str]:
    """Positions in the batch of samples with values that are not finite, each with the reason to record."""
    counts = features.audit[..., STATISTICS.index("non_finite")]
    found: dict[int, str] = {}
    for position, variant, timestep, layer in np.argwhere(counts > 0):
        number = int(counts[position, variant, timestep, layer])
        found.setdefault(
            int(position), f"{number} values of {layers[layer]} at t={timesteps[timestep]:g} are not finite"
        )
    for name, scores in features.concept_scores.items():
        for position in np.flatnonzero(~np.isfinite(scores).all(axis=tuple(range(1, scores.ndim)))):
            found.setdefault(int(position), f"concept scores of vocabulary {name!r} are not finite")
    return found


def _block_index(address: str) -> int:
    return int(address.rpartition(".")[2])
