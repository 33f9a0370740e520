"""Weights in float8: one byte each, and features near those of full weights."""

from pathlib import Path

import pytest
import torch

from mmdiff_cache.backbones.base import Backbone
from mmdiff_cache.backbones.registry import describe, load_backbone
from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.extraction.concept_attention import reading
from mmdiff_cache.extraction.taps import capturing
from tests.tiny_flux import TEXT_LENGTH

FLOAT8_STEP = 2.0**-4
"""Half a step of e4m3 relative to the value: the most by which one weight is rounded."""


def captured(backbone: Backbone) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    noised = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.5, 0.1])
    words = {"two": backbone.embed_concepts(["near", "far"])}
    with (
        reading(backbone.blocks, words, backbone.concept_modulation(t, 3.5)) as streams,
        capturing(backbone.blocks, backbone.blocks, text_tokens=TEXT_LENGTH, image_tokens=16) as seen,
    ):
        backbone.forward(noised, t, backbone.encode_prompts(["", "near"]), 3.5)
    return seen, streams["two"].scores


def test_features_and_scores_stay_near_those_of_full_weights(tiny_flux_folder: Path) -> None:
    info = describe(str(tiny_flux_folder))
    plain, quantised = load_backbone(info), load_backbone(info, quantisation="float8")
    assert quantised.dtype == torch.float32
    for one, other in zip(captured(plain), captured(quantised), strict=True):
        for address in one:
            assert 0 < (one[address] - other[address]).norm() <= FLOAT8_STEP * one[address].norm()


def test_the_blocks_weights_take_one_byte_each_before_and_after_a_forward(tiny_flux_folder: Path) -> None:
    backbone = load_backbone(describe(str(tiny_flux_folder)), dtype="bfloat16", quantisation="float8")
    for _ in range(2):
        for slot in backbone.blocks.values():
            weights = {p.dtype for name, p in slot.block.named_parameters() if "norm" not in name}
            assert weights == {torch.float8_e4m3fn}
        captured(backbone)


def test_other_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantisation must be one of none, float8"):
        ExtractConfig.from_json({"quantisation": "int8"})
