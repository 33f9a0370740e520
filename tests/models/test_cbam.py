"""CBAM against the formulas of its paper, written out with loops."""

import torch
from torch import nn

from mmdiff_cache.models.cbam import CBAM, KERNEL, MINIMUM_HIDDEN, REDUCTION, ChannelGate

B, D, H, W = 2, 6, 5, 9


def build() -> CBAM:
    torch.manual_seed(0)
    return CBAM(D).eval()


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + (-x).exp())


def channel_gate(x: torch.Tensor, module: ChannelGate) -> torch.Tensor:
    """M_c(F) of one sample [D h w]: sigmoid(MLP(avg) + MLP(max)) -> [D]."""
    first, last = module.shared[0], module.shared[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)

    def mlp(vector: torch.Tensor) -> torch.Tensor:
        return last.weight @ (first.weight @ vector + first.bias).clamp(min=0) + last.bias

    mean = torch.stack([channel.sum() / channel.numel() for channel in x])
    highest = torch.stack([channel.max() for channel in x])
    return sigmoid(mlp(mean) + mlp(highest))


def spatial_gate(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """M_s(F) of one sample [D h w]: sigmoid of a 7 x 7 window over (mean, max) of the channels -> [h w]."""
    assert conv.bias is not None
    pooled, reach = torch.stack((x.mean(0), x.max(0).values)), KERNEL // 2
    gate = torch.zeros(H, W)
    for i in range(H):
        for j in range(W):
            total = conv.bias[0].clone()
            for di in range(-reach, reach + 1):
                for dj in range(-reach, reach + 1):
                    if 0 <= i + di < H and 0 <= j + dj < W:
                        total += (conv.weight[0, :, di + reach, dj + reach] * pooled[:, i + di, j + dj]).sum()
            gate[i, j] = total
    return sigmoid(gate)


@torch.no_grad()
def test_equals_the_formulas() -> None:
    module, features = build(), torch.randn(B, D, H, W)
    expected = torch.zeros_like(features)
    for b in range(B):
        gated = features[b] * channel_gate(features[b], module.channel)[:, None, None]
        expected[b] = gated * spatial_gate(gated, module.spatial.conv)
    torch.testing.assert_close(module(features), expected, rtol=1e-4, atol=1e-6)


def test_only_scales_down() -> None:
    features = torch.randn(B, D, H, W)
    refined = build()(features)
    assert (refined.abs() <= features.abs()).all()
    assert (refined.sign() == features.sign()).all()


def test_hidden_width_follows_the_paper_from_128_channels_on() -> None:
    for channels, hidden in ((768, 768 // REDUCTION), (128, 128 // REDUCTION), (64, MINIMUM_HIDDEN)):
        layer = ChannelGate(channels).shared[0]
        assert isinstance(layer, nn.Linear)
        assert layer.out_features == hidden
