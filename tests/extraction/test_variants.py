"""Which variants there are, in which order, and how a prompt is mirrored."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.extraction.plan import plan
from mmdiff_cache.extraction.variants import mirrored, variants_of
from mmdiff_cache.store.schema import Variant


def test_draws_of_the_picture_come_before_those_of_its_mirror_image() -> None:
    assert variants_of(1, flip=False) == (Variant(),)
    assert [(v.noise_draw, v.flipped) for v in variants_of(2, flip=True)] == [
        (0, False), (1, False), (0, True), (1, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "twin"),
    [
        ("", ""),
        ("a Left shoe, LEFT of the rightmost box", "a Right shoe, RIGHT of the leftmost box"),
        ("left-hand drive", "right-hand drive"),
        ("brightly lit, a copyright sign", "brightly lit, a copyright sign"),
    ],
)
def test_left_and_right_change_places(prompt: str, twin: str) -> None:
    assert mirrored(prompt) == twin


@given(st.lists(st.sampled_from(["left", "Right", "LEFTMOST", "a", "rightward", "box"]), max_size=8))
def test_mirroring_twice_gives_the_prompt_back(words: list[str]) -> None:
    prompt = " ".join(words)
    assert mirrored(mirrored(prompt)) == prompt


def test_the_plan_counts_every_variant() -> None:
    one = plan(ExtractConfig(limit=2, concepts={}))
    four = plan(ExtractConfig(limit=2, concepts={}, draws=2, flip=True))
    assert four.cost.operations == 4 * one.cost.operations
    one_map = math.prod(one.schema.grid) * one.schema.channels * 2
    extra = 3 * one.total * len(one.schema.layers) * len(one.schema.timesteps) * one_map
    assert four.raw_bytes >= one.raw_bytes + extra
    assert "4: 2 noise draw(s) of every sample, each also mirrored" in str(four)
    with pytest.raises(ConfigError, match="draws must be positive"):
        ExtractConfig(draws=0)
