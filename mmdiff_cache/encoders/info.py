"""What is known of an encoder before its weights are read. Needs no torch."""

from dataclasses import dataclass

from mmdiff_cache.errors import ConfigError

PAPER_LAYERS, PAPER_BLOCKS = (2, 11), 12
"""DINOv3 ViT-B/16, blocks counted from 0. Paper: Fig. 6; Sec. 3.3 gives no layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderInfo:
    """One vision transformer with square patches, and the blocks whose outputs are stored."""

    name: str
    """What its features are called in a store."""
    source: str
    """A folder, or the id of a repository on the Hugging Face hub."""
    blocks: int
    channels: int
    """Width of a patch token."""
    patch: int
    """Pixels of a patch's side."""
    licence: str

    @property
    def layers(self) -> tuple[str, ...]:
        """The paper's blocks {2, 11} of 12, or those at the same relative depths."""
        depths = {round(k * (self.blocks - 1) / (PAPER_BLOCKS - 1)) for k in PAPER_LAYERS}
        return tuple(str(k) for k in sorted(depths))

    def grid(self, resolution: int) -> tuple[int, int]:
        """Rows and columns of patches of a square input. Raises ConfigError when they do not fill it."""
        if resolution <= 0 or resolution % self.patch:
            below, above = resolution // self.patch * self.patch, (resolution // self.patch + 1) * self.patch
            raise ConfigError(
                f"the resolution must be a multiple of {self.patch}, the patch of {self.name}, got "
                f"{resolution}; try --resolution {' or '.join(str(r) for r in (below, above) if r > 0)}, or "
                "leave the encoder out"
            )
        return resolution // self.patch, resolution // self.patch
