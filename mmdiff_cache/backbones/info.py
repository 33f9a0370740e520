"""What is known of a backbone before its weights are read. Needs no torch, so that a plan costs nothing."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mmdiff_cache.errors import ConfigError

DTypeName = Literal["float32", "bfloat16"]
Quantisation = Literal["none", "float8"]
"""How the transformer's weights lie in memory; `float8`: e4m3, cast to the dtype layer by layer."""

NATIVE, XFORMERS = "native", "xformers"
"""The attention backends that every family can use."""
PATCH = 2
"""Side of the square of latent pixels that one token packs; fixed in every FLUX.1 and SD3 pipeline."""
STEPS = 28
"""Default of both pipelines in diffusers."""
TIMESTEPS = (0.78, 0.52, 0.26, 0.001)
"""Paper: Sec. 3.1."""
PAPER_SINGLE_LAYERS, PAPER_SINGLE_BLOCKS = (4, 15, 26, 37), 38
PAPER_CONCEPT_BLOCKS, PAPER_DOUBLE_BLOCKS = (15, 16, 17, 18), 19
"""ConceptAttention's own choice on FLUX.1; the paper says only 'multiple multi-modal layers' (Sec. 3.2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The shape of a pipeline, as its configuration files give it."""

    pipeline: str
    """Class name in `model_index.json`."""
    double_blocks: int
    single_blocks: int
    channels: int
    """C, the width of a token between blocks."""
    latent_channels: int
    """c, the channels of the VAE's latent."""
    vae_factor: int
    """Pixels along one side of a latent pixel."""
    guidance_embeds: bool
    """Whether the model takes the guidance scale as an input (guidance distilled)."""
    text_channels: int
    """E, the width of a text token before the model's own embedding."""
    pooled_channels: int
    clip_tokens: int = 0
    """Text tokens that stand before those of T5."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneInfo:
    """One backbone with the defaults that belong to it."""

    name: str
    source: str
    """A folder, or the id of a repository on the Hugging Face hub."""
    architecture: Architecture
    layers: tuple[str, ...]
    """Blocks whose outputs are captured when nothing else is said."""
    concept_blocks: tuple[str, ...]
    """Double blocks that the concept maps average over. Paper: Sec. 3.2."""
    timesteps: tuple[float, ...]
    resolution: int
    """Side of the square input, in pixels."""
    guidance: float | None
    """None where the model takes no guidance scale."""
    text_length: int
    """Tokens to which the T5 prompt is padded or cut."""
    aggregator_width: int
    """D of stage two; smaller than C. Paper: Sec. 3.1."""
    dtype: DTypeName
    licence: str
    steps: int = STEPS
    """Steps in which a picture is drawn."""
    true_cfg_scale: float = 1.0
    """Strength of classifier-free guidance by a second pass of the model; 1 is without."""

    @property
    def channels(self) -> int:
        """C."""
        return self.architecture.channels

    def prompt_bytes(self, text_length: int, dtype: DTypeName) -> int:
        """Size of one encoded prompt."""
        shape = self.architecture
        values = (shape.clip_tokens + text_length) * shape.text_channels + shape.pooled_channels
        return values * (4 if dtype == "float32" else 2)

    @property
    def packed_channels(self) -> int:
        """P, the channels of a packed latent token."""
        return self.architecture.latent_channels * PATCH**2

    @property
    def double_blocks(self) -> tuple[str, ...]:
        """Addresses of the blocks with separate weights for text and image, in order."""
        return tuple(f"double.{i}" for i in range(self.architecture.double_blocks))

    @property
    def single_blocks(self) -> tuple[str, ...]:
        """Addresses of the blocks with one set of weights for all tokens, in order."""
        return tuple(f"single.{i}" for i in range(self.architecture.single_blocks))

    @property
    def blocks(self) -> tuple[str, ...]:
        """Every address that can be tapped, in the order in which the blocks run."""
        return self.double_blocks + self.single_blocks

    def token_grid(self, resolution: int) -> tuple[int, int]:
        """h, w of a square input. Raises ConfigError when the tokens do not fill it."""
        side = self.architecture.vae_factor * PATCH
        if resolution <= 0 or resolution % side:
            below, above = resolution // side * side, (resolution // side + 1) * side
            raise ConfigError(
                f"the resolution for {self.name} must be a multiple of {side}, the pixels along a token, "
                f"got {resolution}; try {' or '.join(str(r) for r in (below, above) if r > 0)}"
            )
        return resolution // side, resolution // side

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """[c H/f W/f] of a square input's latent before packing; noise is drawn in this shape."""
        height, width = self.token_grid(resolution)
        return self.architecture.latent_channels, height * PATCH, width * PATCH

    def check_attention(self, name: str) -> None:
        """Raise ConfigError for a backend that this family has no way to use; others are tried at loading."""
        if self.architecture.pipeline == "StableDiffusion3Pipeline" and name not in (NATIVE, XFORMERS):
            raise ConfigError(f"{self.name} computes attention by {NATIVE} or {XFORMERS} only, got {name!r}")

    def check_layers(self, layers: Iterable[str]) -> None:
        """Raise ConfigError for an address that no block has."""
        for layer in layers:
            if layer not in self.blocks:
                ranges = ", ".join(
                    f"{kind[0]}..{kind[-1]}" for kind in (self.double_blocks, self.single_blocks) if kind
                )
                raise ConfigError(f"layer {layer} is not a block of {self.name} ({ranges})")


def default_attention(info: BackboneInfo) -> str:
    """Diffusers' own default, which an environment variable may set, where the family heeds it."""
    heeds = info.architecture.pipeline == "FluxPipeline"
    return os.environ.get("DIFFUSERS_ATTN_BACKEND", NATIVE).lower() if heeds else NATIVE


def same_depth(layers: tuple[int, ...], of: int, count: int) -> tuple[int, ...]:
    """The blocks at the same relative depth in a model with `count` blocks of that kind.

    Block k of `of` becomes round(k (count - 1) / (of - 1)), halves to the even block; repeats are dropped.
    """
    return tuple(sorted({round(k * (count - 1) / (of - 1)) for k in layers})) if count else ()


def default_layers(architecture: Architecture) -> tuple[str, ...]:
    """The paper's single blocks {4, 15, 26, 37} of 38; double blocks at those depths if there are none."""
    kind, count = (
        ("single", architecture.single_blocks)
        if architecture.single_blocks
        else ("double", architecture.double_blocks)
    )
    return tuple(f"{kind}.{k}" for k in same_depth(PAPER_SINGLE_LAYERS, PAPER_SINGLE_BLOCKS, count))


def default_concept_blocks(architecture: Architecture) -> tuple[str, ...]:
    """Blocks 15-18 of 19 double ones, or those at the same depths."""
    count = architecture.double_blocks
    return tuple(f"double.{k}" for k in same_depth(PAPER_CONCEPT_BLOCKS, PAPER_DOUBLE_BLOCKS, count))


def default_width(channels: int) -> int:
    """D: a quarter of C (768 for FLUX.1), at least 64 yet at most half of C, in multiples of eight heads."""
    return max(8, min(max(channels // 4, 64), channels // 2) // 8 * 8)
