"""Whether a whole backbone fits a device, judged by the size of its weight files."""

from pathlib import Path
from typing import Literal

from mmdiff_cache.backbones.info import BackboneInfo
from mmdiff_cache.backbones.weights import locate, weight_bytes
from mmdiff_cache.errors import BackboneError
from mmdiff_cache.extraction.measured import device_type

SHARE = 0.8
"""Of the free memory that weights may fill; the rest is for what flows through them."""


def choose_text_pass(info: BackboneInfo, device: str) -> Literal["together", "first"]:
    """`first` where transformer, VAE and text encoders do not fit together.

    Weights that are not here yet are taken to fit; the next plan, after their download, knows better.
    """
    try:
        needed = weight_bytes(locate(info))
    except BackboneError:
        return "together"
    return "together" if fits(needed, free_memory(device)) else "first"


def fits(weights: int, free: int | None) -> bool:
    """Whether so many bytes of weights go into so much memory; None is unknown and taken to be enough."""
    return free is None or weights <= SHARE * free


def free_memory(device: str) -> int | None:
    """Bytes that a process can still have on a device; None where the system does not say."""
    if device_type(device) == "cuda":
        import torch

        return torch.cuda.mem_get_info(None if device == "auto" else torch.device(device))[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kibibytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kibibytes is None else int(kibibytes) * 1024
