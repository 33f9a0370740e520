"""CBAM against the formulas of its paper, written out with loops."""

import torch
from torch import nn

from mmdiff_cache.models.cbam import CBAM, MINIMUM_HIDDEN, REDUCTION, ChannelGate
from tests.models import equations

B, D, H, W = 2, 6, 5, 9


def build() -> CBAM:
    torch.manual_seed(0)
    return CBAM(D).eval()


@torch.no_grad()
def test_equals_the_formulas() -> None:
    module, features = build(), torch.randn(B, D, H, W)
    torch.testing.assert_close(module(features), equations.cbam(features, module), rtol=1e-4, atol=1e-6)


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
