"""How long a run of stage one may take: counted operations over an assumed speed."""

from dataclasses import dataclass

from mmdiff_cache.backbones.info import BackboneInfo
from mmdiff_cache.config import ExtractConfig, filled

CPU_SPEED = 20e9
"""Assumed floating-point operations a second and thread."""
CUDA_SPEED = 200e12
"""Assumed floating-point operations a second of a data-centre GPU in bfloat16, at most half of its peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """An estimate, said to be one; while a run goes on, its measured speed takes over."""

    operations: float
    """Floating-point operations of all forward passes of the transformer."""
    speed: float
    """Assumed operations a second."""
    device: str
    """`cpu` or `cuda`."""

    @property
    def seconds(self) -> float:
        """Estimated duration."""
        return self.operations / self.speed

    def __str__(self) -> str:
        total, speed = show_operations(self.operations), show_operations(self.speed)
        return f"about {show_duration(self.seconds)} ({total} at an assumed {speed}/s)"


def estimate(config: ExtractConfig, info: BackboneInfo, *, samples: int) -> Cost:
    """The cost of a resolved configuration for so many samples: transformer alone (forward_operations)."""
    blocks = 1 + max(info.blocks.index(layer) for layer in filled(config.layers))
    if config.concepts:
        blocks = max(blocks, len(info.double_blocks))
    forward = forward_operations(info, filled(config.resolution), filled(config.text_length), blocks)
    device = device_type(config.device)
    operations = forward * len(filled(config.timesteps)) * samples
    return Cost(operations=operations, speed=_speed(device), device=device)


def forward_operations(info: BackboneInfo, resolution: int, text_length: int, blocks: int) -> float:
    """Floating-point operations of one forward pass through so many blocks.

    A block costs 24 C^2 S + 4 S^2 C for S tokens of text and image, double and single blocks alike; the
    concept stream, the VAE and the text encoders are left out.
    """
    rows, columns = info.token_grid(resolution)
    tokens, width = rows * columns + info.architecture.clip_tokens + text_length, info.channels
    return blocks * (24 * width**2 * tokens + 4 * tokens**2 * width)


def device_type(name: str) -> str:
    """`cpu` or `cuda`, whichever a device's name comes to on this machine."""
    import torch

    return "cuda" if name.startswith("cuda") or (name == "auto" and torch.cuda.is_available()) else "cpu"


def _speed(device: str) -> float:
    import torch

    return CUDA_SPEED if device == "cuda" else CPU_SPEED * torch.get_num_threads()


def show_duration(seconds: float) -> str:
    """Seconds in the unit a person would use: 40 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def show_operations(count: float) -> str:
    for unit in ("GFLOP", "TFLOP", "PFLOP"):
        if count < 1e12 or unit == "PFLOP":
            return f"{count / 1e9:,.3g} {unit}"
        count /= 1000
    raise AssertionError("the last unit returns")
