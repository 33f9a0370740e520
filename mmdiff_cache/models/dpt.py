"""DPT on fused diffusion features: the layers become a pyramid and are fused from coarse to fine.

A transformer's layers share one grid, so the pyramid is made: the shallowest layer becomes the finest level,
the deepest the coarsest, each a factor of two apart. Paper: Sec. 3.4 and reference [37] (Ranftl, 2021).
"""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .decoder import Decoder, check_width, resize

LEVEL_SHARE = (4, 2, 1)
"""Channels inside the levels, finest first, are width / share; further levels keep the width.

Reference [37] widens its levels with depth in the same way.
"""


class Reassemble(nn.Module):
    """One layer's map to one level of the pyramid: 1 x 1, change of grid, 3 x 3 to the common width.

    `exponent` is log2 of the level's grid over the token grid: 2 makes it four times finer, -1 half as fine.
    Learned transposed convolutions go up, strided 3 x 3 convolutions go down.
    """

    def __init__(self, in_channels: int, channels: int, width: int, exponent: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(in_channels, channels, 1)
        factor = 2 ** abs(exponent)
        if exponent > 0:
            self.resample: nn.Module = nn.ConvTranspose2d(channels, channels, factor, stride=factor)
        elif exponent < 0:
            self.resample = nn.Conv2d(channels, channels, factor + 1, stride=factor, padding=factor // 2)
        else:
            self.resample = nn.Identity()
        self.widen = nn.Conv2d(channels, width, 3, padding=1, bias=False)

    def forward(self, x: Float[Tensor, "B E h w"]) -> Float[Tensor, "B W hl wl"]:
        """The level's map."""
        return self.widen(self.resample(self.project(x)))


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))), without norms as in the regression heads of reference [37]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "B W hl wl"]) -> Float[Tensor, "B W hl wl"]:
        """The map with what two convolutions add."""
        return x + self.second(functional.relu(self.first(functional.relu(x))))


class Fusion(nn.Module):
    """RefineNet-like fusion: refine a level, add the coarser levels' sum, refine that, mix the channels."""

    def __init__(self, width: int, coarsest: bool) -> None:
        super().__init__()
        self.level_unit = None if coarsest else ResidualUnit(width)
        self.sum_unit = ResidualUnit(width)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(
        self, level: Float[Tensor, "B W hl wl"], coarser: Float[Tensor, "B W hc wc"] | None
    ) -> Float[Tensor, "B W hl wl"]:
        """The levels down to this one, on this level's grid; the coarsest level has nothing to add."""
        if coarser is not None and self.level_unit is not None:
            rows, columns = level.shape[-2:]
            level = self.level_unit(level) + resize(coarser, (rows, columns))
        return self.mix(self.sum_unit(level))


@final
class DPT(Decoder):
    """Reassemble each layer, fuse from the deepest to the shallowest, one 3 x 3 convolution, head.

    The finest level has a grid `upsampling` (a power of two) times as fine as the tokens'.
    Concept and discriminative maps join every layer's map before its projection.
    """

    def __init__(
        self, *, layers: int, features: int, guidance: int, width: int, out_channels: int, upsampling: int
    ) -> None:
        super().__init__()
        check_width(width, LEVEL_SHARE[0])
        finest = upsampling.bit_length() - 1
        shares = (LEVEL_SHARE + (1,) * layers)[:layers] if layers > 1 else (1,)
        self.reassemble = nn.ModuleList(
            Reassemble(features + guidance, width // share, width, finest - level)
            for level, share in enumerate(shares)
        )
        self.fusions = nn.ModuleList(Fusion(width, coarsest=level == layers - 1) for level in range(layers))
        self.refine = nn.Sequential(nn.Conv2d(width, width // 2, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(width // 2, out_channels, 1)

    def decode(
        self, features: Sequence[Float[Tensor, "B D h w"]], guidance: Float[Tensor, "B G h w"] | None
    ) -> Float[Tensor, "B W hd wd"]:
        """All levels fused, on the finest level's grid."""
        fused: Tensor | None = None
        for feature, reassemble, fusion in zip(
            reversed(features), reversed(self.reassemble), reversed(self.fusions), strict=True
        ):
            joined = feature if guidance is None else torch.cat([feature, guidance], dim=1)
            fused = fusion(reassemble(joined), fused)
        assert fused is not None
        return self.refine(fused)
