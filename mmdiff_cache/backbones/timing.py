"""How fast this machine runs blocks of a backbone: its own classes, and random weights.

What is timed is the transformer's blocks alone, uncompiled, without concept maps, VAE and text encoders.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from mmdiff_cache.backbones.info import PATCH, BackboneInfo, DTypeName
from mmdiff_cache.backbones.pipeline import DTYPES, choose_device
from mmdiff_cache.backbones.registry import FLUX, transformer_config

BLOCKS = 2
"""One of each kind for FLUX, two joint ones for SD3."""
ROUNDS = 5
TOKENS_ON_CPU = 4096
"""A pass on the CPU is cut to about as many tokens; the time a token hardly depends on more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTime:
    """What a pass through a block took."""

    seconds: float
    """A block and a batch element; the median of ROUNDS."""
    activation_bytes: int | None
    """GPU memory that a pass needs beside the weights; None on the CPU."""


def time_blocks(
    info: BackboneInfo,
    *,
    resolution: int,
    text_length: int,
    batch: int,
    device: str,
    dtype: DTypeName,
) -> BlockTime:
    """Time the blocks of a backbone with random weights; `batch` counts samples times timesteps."""
    chosen = choose_device(device)
    rows, columns = info.token_grid(resolution)
    text = info.architecture.clip_tokens + text_length
    if chosen.type == "cpu":
        batch = min(batch, max(1, TOKENS_ON_CPU // (rows * columns + text)))
    with torch.device(chosen):
        model = _few_blocks(info).to(DTYPES[dtype]).requires_grad_(False).eval()
        inputs = _inputs(info, model.config, batch, (rows, columns), text, DTYPES[dtype])
    with torch.inference_mode():
        activations = _first_pass(model, inputs, chosen)
        seconds = [_seconds(model, inputs, chosen) for _ in range(ROUNDS)]
    return BlockTime(seconds=statistics.median(seconds) / BLOCKS / batch, activation_bytes=activations)


def _first_pass(model: Any, inputs: dict[str, Any], device: torch.device) -> int | None:
    """Warm up; the GPU memory that it took beside the weights."""
    if device.type == "cpu":
        model(**inputs)
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model(**inputs)
    return torch.cuda.max_memory_allocated(device) - before


def _seconds(model: Any, inputs: dict[str, Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    model(**inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _few_blocks(info: BackboneInfo) -> Any:
    """The backbone's transformer cut to BLOCKS blocks; where no weights are here, by its class's defaults."""
    shape, config = info.architecture, transformer_config(info)
    if shape.pipeline == FLUX:
        few = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": shape.guidance_embeds}
        return cast(Any, FluxTransformer2DModel).from_config({**config, **few})
    heads = shape.double_blocks
    size = {"num_attention_heads": heads, "caption_projection_dim": shape.channels, "qk_norm": "rms_norm"}
    return cast(Any, SD3Transformer2DModel).from_config({**size, **config, "num_layers": BLOCKS})


def _inputs(
    info: BackboneInfo, config: Any, batch: int, grid: tuple[int, int], text: int, dtype: torch.dtype
) -> dict[str, Any]:
    tokens = grid[0] * grid[1]
    inputs: dict[str, Any] = {
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, text, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, dtype=dtype),
        "return_dict": False,
    }
    if info.architecture.pipeline != FLUX:
        size = (config.in_channels, grid[0] * PATCH, grid[1] * PATCH)
        return {**inputs, "hidden_states": torch.randn(batch, *size, dtype=dtype)}
    return {
        **inputs,
        "hidden_states": torch.randn(batch, tokens, config.in_channels, dtype=dtype),
        "guidance": torch.full((batch,), 3.5) if config.guidance_embeds else None,
        "txt_ids": torch.zeros(text, 3),
        "img_ids": torch.zeros(tokens, 3),
    }
