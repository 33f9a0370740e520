"""Every encoder by name, and any folder of a DINOv3 vision transformer. No torch until weights are loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmdiff_cache.encoders.info import EncoderInfo
from mmdiff_cache.encoders.weights import locate, read_shape
from mmdiff_cache.errors import BackboneError, ConfigError

if TYPE_CHECKING:
    import torch

    from mmdiff_cache.encoders.dinov3 import DINOv3

ENCODERS: Mapping[str, EncoderInfo] = {
    f"dinov3-vit{size}16": EncoderInfo(
        name=f"dinov3-vit{size}16",
        source=f"facebook/dinov3-vit{size}16-pretrain-lvd1689m",
        blocks=blocks,
        channels=channels,
        patch=16,
        licence="DINOv3 License, to be accepted on the hub before the download",
    )
    for size, blocks, channels in (("s", 12, 384), ("b", 12, 768), ("l", 24, 1024))
}
"""The paper's is `dinov3-vitb16`."""


def describe_encoder(name_or_folder: str) -> EncoderInfo:
    """What an encoder is, from the table or a folder's configuration alone.

    Raises ConfigError for what is neither a name nor a folder, BackboneError for a folder of another format.
    """
    if name_or_folder in ENCODERS:
        return ENCODERS[name_or_folder]
    folder = Path(name_or_folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"{name_or_folder!r} is neither a discriminative encoder ({', '.join(ENCODERS)}) nor a folder of "
            "one"
        )
    folder = folder.resolve()
    blocks, channels, patch = read_shape(folder)
    return EncoderInfo(
        name=folder.name,
        source=str(folder),
        blocks=blocks,
        channels=channels,
        patch=patch,
        licence="see the model's own card",
    )


def load_encoder(info: EncoderInfo, *, device: "str | torch.device" = "cpu") -> "DINOv3":
    """Load an encoder's weights, frozen, in float32. Raises BackboneError when they are missing or others."""
    folder = locate(info, download=True)
    if read_shape(folder) != (info.blocks, info.channels, info.patch):
        raise BackboneError(f"{folder} does not hold {info.name}, but a DINOv3 of another shape")
    from mmdiff_cache.encoders.dinov3 import load_dinov3

    return load_dinov3(info, folder, device=device)
