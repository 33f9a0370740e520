"""DeepLabV3+ on fused diffusion features: ASPP for context, a low-level branch for edges, a small decoder.

A diffusion transformer has one grid at every depth, so there is no fine early map to take edges from.
The low-level input is the fused map of the shallowest tapped layer, and its projection is unfolded to the
decoder's finer grid: each token's channels hold what lies inside its patch.
Paper: Sec. 3.4 and references [5], [6].
"""

from collections.abc import Sequence
from typing import final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .decoder import CHANNELS_PER_GROUP, ConvNormAct, Decoder, check_width, resize

RATES = (6, 12, 18)
"""Dilations of reference [6], made for a grid of 32 x 32; other grids scale them."""
RATES_GRID = 32
LOW_LEVEL_CHANNELS = 48
"""Channels of the low-level branch (reference [6])."""
DROPOUT = 0.1
"""Before the head (reference [6] and its public implementations)."""


def aspp_rates(grid: int) -> tuple[int, ...]:
    """Dilations that look as far across a grid of this side as (6, 12, 18) do across 32: (3, 6, 9) at 16."""
    return tuple(max(1, round(rate * grid / RATES_GRID)) for rate in RATES)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1 x 1, three dilated 3 x 3 and the mean of the map, side by side."""

    def __init__(self, in_channels: int, width: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.pointwise = ConvNormAct(in_channels, width, 1)
        self.dilated = nn.ModuleList(ConvNormAct(in_channels, width, 3, rate) for rate in rates)
        self.pooled = ConvNormAct(in_channels, width, 1)
        self.project = ConvNormAct((len(rates) + 2) * width, width, 1)

    def forward(self, x: Float[Tensor, "B E h w"]) -> Float[Tensor, "B W h w"]:
        """Context at five ranges, joined by a 1 x 1 convolution."""
        branches = [self.pointwise(x), *(branch(x) for branch in self.dilated)]
        everywhere = self.pooled(x.mean(dim=(2, 3), keepdim=True)).expand_as(branches[0])
        return self.project(torch.cat([*branches, everywhere], dim=1))


class LowLevel(nn.Module):
    """1 x 1 projection of the shallowest layer, each token unfolded to `upsampling` x `upsampling` places."""

    def __init__(self, features: int, channels: int, upsampling: int) -> None:
        super().__init__()
        self.upsampling = upsampling
        self.conv = nn.Conv2d(features, channels * upsampling**2, 1, bias=False)
        self.norm = nn.Sequential(
            nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels), nn.ReLU(inplace=True)
        )

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B E hd wd"]:
        """Low-level features on the decoder's grid, `upsampling` times as fine as the tokens'."""
        unfolded = rearrange(
            self.conv(x), "b (c r s) h w -> b c (h r) (w s)", r=self.upsampling, s=self.upsampling
        )
        return self.norm(unfolded)


@final
class DeepLabV3Plus(Decoder):
    """ASPP over all layers and the guidance, joined with the low-level branch on a finer grid.

    `features` is D, `guidance` the channels of concept and discriminative maps (they join the ASPP's input),
    `grid` the side of the token grid; the decoder's is `upsampling` times as fine.
    The first of the features must be the shallowest layer's.
    """

    def __init__(
        self,
        *,
        layers: int,
        features: int,
        guidance: int,
        width: int,
        out_channels: int,
        grid: int,
        upsampling: int,
    ) -> None:
        super().__init__()
        check_width(width, CHANNELS_PER_GROUP)
        low_level = min(LOW_LEVEL_CHANNELS, width)
        self.aspp = ASPP(layers * features + guidance, width, aspp_rates(grid))
        self.low_level = LowLevel(features, low_level, upsampling)
        self.refine = nn.Sequential(
            ConvNormAct(width + low_level, width, 3), ConvNormAct(width, width, 3), nn.Dropout(DROPOUT)
        )
        self.head = nn.Conv2d(width, out_channels, 1)

    def decode(
        self, features: Sequence[Float[Tensor, "B D h w"]], guidance: Float[Tensor, "B G h w"] | None
    ) -> Float[Tensor, "B W hd wd"]:
        """Context brought to the low-level branch's grid, then two 3 x 3 convolutions over both."""
        everything = torch.cat([*features, *([] if guidance is None else [guidance])], dim=1)
        low_level = self.low_level(features[0])
        rows, columns = low_level.shape[-2:]
        context = resize(self.aspp(everything), (rows, columns))
        return self.refine(torch.cat([context, low_level], dim=1))
