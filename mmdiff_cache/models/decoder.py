"""What every decoder is: a network from fused features to a map, and the 1 x 1 convolution on top.

Decoder = everything but the last 1 x 1 convolution; head = that convolution (Paper: Sec. 3.4).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mmdiff_cache.errors import ConfigError

CHANNELS_PER_GROUP = 8
"""GroupNorm stands where the papers have batch norm: batches are small, and no image alters another's."""


class Decoder(nn.Module, ABC):
    """Fused features of L layers and optional guidance maps to one map of `out_channels` at any size.

    Guidance is what is concatenated unfused: concept maps and discriminative features (Paper: Sec. 3.3).
    """

    head: nn.Conv2d
    """The last 1 x 1 convolution."""

    @abstractmethod
    def decode(
        self, features: Sequence[Float[Tensor, "B D h w"]], guidance: Float[Tensor, "B G h w"] | None
    ) -> Float[Tensor, "B W hd wd"]:
        """The map that the head reads, at the decoder's own grid."""

    def forward(
        self,
        features: Sequence[Float[Tensor, "B D h w"]],
        guidance: Float[Tensor, "B G h w"] | None,
        size: tuple[int, int],
    ) -> Float[Tensor, "B out H W"]:
        """Logits in float32, resized bilinearly to `size` = (H, W)."""
        logits = self.head(self.decode(features, guidance)).float()
        return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


class ConvNormAct(nn.Sequential):
    """Convolution that keeps the grid, GroupNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, dilation: int = 1) -> None:
        padding = dilation * (kernel // 2)
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False),
            nn.GroupNorm(out_channels // CHANNELS_PER_GROUP, out_channels),
            nn.ReLU(inplace=True),
        )


def check_width(width: int, multiple: int) -> None:
    """Raise ConfigError unless the decoder's width can be cut as its blocks need it."""
    if width <= 0 or width % multiple:
        raise ConfigError(f"decoder_width must be a multiple of {multiple}, got {width}")


def resize(features: Float[Tensor, "B W hi wi"], size: tuple[int, int]) -> Float[Tensor, "B W ho wo"]:
    """Bilinear, with pixel centres aligned."""
    return functional.interpolate(features, size=size, mode="bilinear", align_corners=False)
