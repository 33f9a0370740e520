"""The linear probe: one 1 x 1 convolution on everything concatenated shows what the features alone hold."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .decoder import Decoder


@final
class Linear(Decoder):
    """One 1 x 1 convolution over L * D + G channels, then bilinear upsampling; it is all head."""

    def __init__(self, *, layers: int, features: int, guidance: int, out_channels: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(layers * features + guidance, out_channels, 1)

    def decode(
        self, features: Sequence[Float[Tensor, "B D h w"]], guidance: Float[Tensor, "B G h w"] | None
    ) -> Float[Tensor, "B W h w"]:
        """The concatenation itself."""
        return torch.cat([*features, *([] if guidance is None else [guidance])], dim=1)
