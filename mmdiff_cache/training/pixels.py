"""A small U-Net on the pictures themselves: what the task is worth without any backbone.

It takes the place of the aggregators and the decoder (`source="images"`), so that it is trained, stored and
scored by the same code with the same steps, losses and labels. A baseline, not a part of the paper.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mmdiff_cache.config import Config

WIDTHS = (32, 48, 64, 96)
"""Channels at 1/2, 1/4, 1/8 and 1/16 of the picture's size: about 0.5 M parameters."""
GROUPS = 8
PIXELS_MULTIPLE = 16
"""Sides of the pictures must be multiples of it: four halvings."""
LEARNING_RATE = 2e-3
"""It starts from nothing, so it learns at twenty times the rate of the heads, lest it be a straw man."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelSpec(Config):
    """Everything that decides the shape of a `PixelUNet`."""

    out_channels: int
    output: Literal["logits", "depth"] = "logits"
    """`depth` makes the output exp(network), in metres."""
    typical_depth: float = 1.0
    """Metres that an untrained depth model answers."""


class Stage(nn.Sequential):
    """Two 3 x 3 convolutions, each with GroupNorm and SiLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            *(
                layer
                for number in range(2)
                for layer in (
                    nn.Conv2d(in_channels if number == 0 else channels, channels, 3, padding=1, bias=False),
                    nn.GroupNorm(GROUPS, channels),
                    nn.SiLU(inplace=True),
                )
            )
        )


class PixelUNet(nn.Module):
    """Four scales down, three up, on 2 x 2 pixels at a time; called like `MMDiff`, on pictures."""

    def __init__(self, spec: PixelSpec) -> None:
        super().__init__()
        self.spec = spec
        inputs = (3 * 4, *WIDTHS[:-1])
        self.down = nn.ModuleList(Stage(i, o) for i, o in zip(inputs, WIDTHS, strict=True))
        self.up = nn.ModuleList(Stage(WIDTHS[n] + WIDTHS[n + 1], WIDTHS[n]) for n in reversed(range(3)))
        self.head = nn.Conv2d(WIDTHS[0], 4 * spec.out_channels, 1)
        if spec.output == "depth" and self.head.bias is not None:
            nn.init.constant_(self.head.bias, math.log(spec.typical_depth))

    def forward(
        self,
        hidden_states: Float[Tensor, "B 1 L H0 W0 3"],
        concepts: Tensor | None = None,
        discriminative: Sequence[Tensor] = (),
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "B out H W"]:
        """Logits, or metres, for pictures in [-1, 1] whose sides are multiples of 16."""
        x = rearrange(hidden_states[:, 0, 0], "B (H a) (W b) c -> B (c a b) H W", a=2, b=2)
        skips: list[Tensor] = []
        for number, stage in enumerate(self.down):
            x = stage(x if number == 0 else functional.max_pool2d(x, 2))
            skips.append(x)
        for stage, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            rows, columns = skip.shape[-2:]
            x = stage(torch.cat([functional.interpolate(x, size=(rows, columns)), skip], dim=1))
        output = rearrange(self.head(x), "B (o a b) H W -> B o (H a) (W b)", a=2, b=2)
        if size is not None:
            output = functional.interpolate(output, size=size, mode="bilinear", align_corners=False)
        return output.exp() if self.spec.output == "depth" else output

    def parameter_counts(self) -> dict[str, int]:
        """Trainable parameters of each part."""
        head = sum(parameter.numel() for parameter in self.head.parameters())
        return {"network": sum(parameter.numel() for parameter in self.parameters()) - head, "head": head}
