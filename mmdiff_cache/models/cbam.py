"""Convolutional block attention: where and what to keep, as two gates in a row.

Paper: Sec. 3.1 and App. F; the module is that of reference [47] (Woo et al., 2018).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

REDUCTION = 16
"""Channels a hidden unit of the channel gate (the value of reference [47])."""
MINIMUM_HIDDEN = 8
"""Narrow maps keep at least this many hidden units; at 64 channels a sixteenth would be four."""
KERNEL = 7
"""Side of the spatial gate's window, in tokens."""


class ChannelGate(nn.Module):
    """sigmoid(MLP(mean over tokens) + MLP(max over tokens)), with one MLP for both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // REDUCTION, MINIMUM_HIDDEN)
        self.shared = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, features: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D 1 1"]:
        """One gate in (0, 1) for each channel of each sample."""
        scores = self.shared(features.mean(dim=(2, 3))) + self.shared(features.amax(dim=(2, 3)))
        return scores.sigmoid()[:, :, None, None]


class SpatialGate(nn.Module):
    """sigmoid of a 7 x 7 convolution over the mean and the maximum of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, KERNEL, padding=KERNEL // 2)

    def forward(self, features: Float[Tensor, "B D h w"]) -> Float[Tensor, "B 1 h w"]:
        """One gate in (0, 1) for each token of each sample."""
        pooled = torch.stack((features.mean(dim=1), features.amax(dim=1)), dim=1)
        return self.conv(pooled).sigmoid()


class CBAM(nn.Module):
    """Channel gate, then spatial gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = ChannelGate(channels)
        self.spatial = SpatialGate()

    def forward(self, features: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """The features, scaled by both gates; the shape stays."""
        features = features * self.channel(features)
        return features * self.spatial(features)
