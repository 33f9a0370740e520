"""The vocabularies by name, and how they are asked for."""

import pytest

from mmdiff_cache.cli.configuration import parse_vocabularies
from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.datasets.concepts import DEFAULT, PRESETS
from mmdiff_cache.datasets.registry import DATASETS
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.store.schema import check_name


def test_every_store_has_the_tasks_vocabularies_and_one_with_all_their_words() -> None:
    for entry in DATASETS.values():
        assert set(entry.concepts) == {"segmentation", "saliency", "depth", "unified"}
    assert set(DEFAULT["unified"]) == {word for words in DEFAULT.values() for word in words}


def test_presets_can_be_stored() -> None:
    ExtractConfig(concepts=PRESETS)
    for name in PRESETS:
        check_name(name, "concept vocabulary")
    assert len(set(PRESETS.values())) == len(PRESETS)
    assert len(PRESETS["voc-everything"]) == 27


def test_a_preset_is_asked_for_by_its_name() -> None:
    asked = parse_vocabularies(["nyu-distance", "mine=cat, dog"])
    assert asked == {"nyu-distance": ["near", "far", "depth", "distance", "surface"], "mine": ["cat", "dog"]}
    assert parse_vocabularies(["none"]) == {}
    with pytest.raises(ConfigError, match="one of segmentation, saliency, depth, unified, voc-groups"):
        parse_vocabularies(["distance"])
