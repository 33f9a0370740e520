"""The vocabularies by name, and how they are asked for."""

import pytest

from mmdiff_cache.cli.configuration import parse_vocabularies
from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.datasets.concepts import DEFAULT, PRESETS
from mmdiff_cache.datasets.registry import DATASETS
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.scenes import CLASS_NAMES, SHAPES
from mmdiff_cache.scenes.captions import VOCABULARY
from mmdiff_cache.store.schema import check_name

OURS = ("unified", "scenes-structure-classes", "scenes-classes", "untrained-4", "untrained-5")


def test_every_store_has_the_tasks_vocabularies_and_one_with_all_their_words() -> None:
    for entry in DATASETS.values():
        assert set(entry.concepts) == {"segmentation", "saliency", "depth", "unified"}
    assert set(DEFAULT["unified"]) == {word for words in DEFAULT.values() for word in words}


def test_presets_can_be_stored() -> None:
    ExtractConfig(concepts=PRESETS)
    for name in PRESETS:
        check_name(name, "concept vocabulary")


def test_presets_are_the_papers_sets_word_for_word() -> None:
    """Paper: Tab. 11-13, each line in the order of its words; the unified set and that of scenes are ours."""
    classes = (
        "airplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, table, dog, horse, motorbike, "
        "person, plant, sheep, sofa, train, television"
    )
    assert {name: ", ".join(words) for name, words in PRESETS.items() if name not in OURS} == {
        "segmentation": "object, background, detail, edges",
        "voc-groups": "living, vehicle, furniture, object, background",
        "voc-structure-groups": "object, background, living, vehicle, furniture, detail, edges",
        "voc-structure-classes": f"object, background, detail, edges, {classes}",
        "voc-everything": f"living, vehicle, furniture, object, background, detail, edges, {classes}",
        "saliency": "background, object, edges, salient, contour",
        "duts-scene": "object, foreground, background, scene",
        "depth": "depth, surface, object, near, far",
        "nyu-surface": "depth, surface, object, background",
        "nyu-indoor": "wall, floor, furniture, object, depth",
        "nyu-distance": "near, far, depth, distance, surface",
    }


def test_untrained_words_are_in_no_caption_and_as_many_as_those_they_stand_for() -> None:
    for task in ("segmentation", "saliency", "depth"):
        assert not set(PRESETS[f"untrained-{len(DEFAULT[task])}"]) & set(VOCABULARY)


def test_the_classes_of_scenes_take_the_place_of_those_of_voc() -> None:
    assert PRESETS["scenes-structure-classes"] == (*PRESETS["segmentation"], *SHAPES)
    assert PRESETS["scenes-classes"] == CLASS_NAMES


def test_a_preset_is_asked_for_by_its_name() -> None:
    asked = parse_vocabularies(["nyu-distance", "mine=cat, dog"])
    assert asked == {"nyu-distance": ["near", "far", "depth", "distance", "surface"], "mine": ["cat", "dog"]}
    assert parse_vocabularies(["none"]) == {}
    with pytest.raises(ConfigError, match="one of segmentation, saliency, depth, unified, voc-groups"):
        parse_vocabularies(["distance"])
