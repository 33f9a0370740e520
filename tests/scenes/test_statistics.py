"""What the world promises over many scenes: headroom, independence, true and varied captions."""

import re
from collections import Counter

import numpy as np
import pytest

from mmdiff_cache.scenes import (
    COLOURS,
    CONCEPT_WORDS,
    GROUNDS,
    SHAPES,
    TEXTURES,
    TIMES,
    VOCABULARY,
    Scene,
)
from mmdiff_cache.scenes.camera import FOCAL
from mmdiff_cache.scenes.captions import FAR_AWAY, NEAR
from mmdiff_cache.scenes.sampler import LEAD, MAX_HIDDEN

CLAIM = r"the (\w+ \w+) (is near|near the|is far|far off|is in front of the)"


def words(text: str) -> list[str]:
    return re.sub(r"[,.]", " ", text).split()


def test_many_objects_are_hidden_or_cut(many: list[Scene]) -> None:
    hidden = np.array([one.hidden_share for scene in many for one in scene.objects])
    assert (hidden > 0.05).mean() >= 0.40
    assert hidden.max() <= MAX_HIDDEN


def test_counts(many: list[Scene]) -> None:
    counts = Counter(len(scene.objects) for scene in many)
    assert set(counts) == {1, 2, 3, 4}
    assert counts[1] + counts[2] > 0.65 * len(many)


def test_sizes_are_spread_log_uniformly(many: list[Scene]) -> None:
    """Width in the picture: at least three tokens for most, and each third of the log range well filled."""
    width = np.array([one.size * FOCAL / one.mean_depth for scene in many for one in scene.objects])
    assert (width >= 3 / 16).mean() > 0.95
    # The depth is that of the visible front, so that a width can lie a little above the range drawn from.
    share = np.histogram(np.log(width), np.log([0.2, 0.31, 0.46, 0.75]))[0] / width.size
    assert share.min() > 0.2
    assert share.sum() > 0.95


def test_the_salient_object_stands_out_and_is_no_giveaway(many: list[Scene]) -> None:
    several = [scene for scene in many if len(scene.objects) > 1]
    neither = 0
    for scene in several:
        scores = sorted((one.salience for one in scene.objects), reverse=True)
        assert scores[0] >= LEAD * scores[1]
        assert scene.objects[scene.salient_index].salience == scores[0]
        nearest = int(np.argmin([one.mean_depth for one in scene.objects]))
        neither += scene.salient_index not in (nearest, scene.caption_order[0])
    assert neither / len(several) >= 0.40


def test_attributes_are_even_and_independent(many: list[Scene]) -> None:
    objects = [(one, scene.ground, scene.time_of_day) for scene in many for one in scene.objects]
    rows = {
        "shape": [SHAPES.index(one.shape) for one, _, _ in objects],
        "colour": [COLOURS.index(one.colour) for one, _, _ in objects],
        "texture": [TEXTURES.index(one.texture) for one, _, _ in objects],
        "ground": [GROUNDS.index(ground) for _, ground, _ in objects],
        "time": [TIMES.index(time) for _, _, time in objects],
    }
    names = list(rows)
    for number, first in enumerate(names):
        for second in names[:number]:
            table = np.zeros((max(rows[first]) + 1, max(rows[second]) + 1))
            np.add.at(table, (rows[first], rows[second]), 1)
            expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
            free = (table.shape[0] - 1) * (table.shape[1] - 1)
            excess = ((table - expected) ** 2 / expected).sum() - free
            assert excess < 5 * np.sqrt(2 * free), (first, second)


@pytest.mark.parametrize("concept", CONCEPT_WORDS)
def test_concept_words_stand_in_enough_captions(concept: str, many: list[Scene]) -> None:
    share = np.mean([bool(re.search(rf"\b{concept}\b", scene.caption)) for scene in many])
    assert share >= 0.05


def test_captions_use_the_closed_vocabulary(many: list[Scene]) -> None:
    assert len(VOCABULARY) <= 200
    for scene in many:
        text = scene.caption
        assert set(words(text)) <= set(VOCABULARY)
        assert set(words(scene.prompt_scene)) <= set(VOCABULARY)
        assert re.fullmatch(r"[a-z ,.]+\.", text)
        assert len(words(text)) <= 40
        assert "  " not in text
    assert len({scene.caption for scene in many}) > 0.97 * len(many)


def test_captions_name_every_object_in_order_and_the_ground(many: list[Scene]) -> None:
    for scene in many:
        named = [
            rf"\ban? {one.colour}( {one.texture})? {one.shape}\b"
            for one in (scene.objects[number] for number in scene.caption_order)
        ]
        assert re.search(".*".join(named), scene.caption), scene.caption
        assert scene.ground in words(scene.caption)
        assert scene.ground in scene.prompt_scene
        assert not set(words(scene.prompt_scene)) & {*SHAPES, *COLOURS}


def test_caption_order_knows_nothing_of_depth_or_salience(many: list[Scene]) -> None:
    pairs = [scene for scene in many if len(scene.objects) == 2]
    nearest = [int(np.argmin([one.mean_depth for one in scene.objects])) for scene in pairs]
    first = [scene.caption_order[0] for scene in pairs]
    margin = 4 * 0.5 / np.sqrt(len(pairs))
    assert abs(np.mean(np.equal(first, nearest)) - 0.5) < margin
    assert abs(np.mean([scene.caption_order[0] == scene.salient_index for scene in pairs]) - 0.5) < margin


def test_claims_are_true(many: list[Scene]) -> None:
    checked = Counter[str]()
    for scene in many:
        by_name = {f"{one.colour} {one.shape}": one for one in scene.objects}
        for name, claim in re.findall(CLAIM, scene.caption):
            if name not in by_name:
                continue
            checked[claim] += 1
            depth = by_name[name].mean_depth
            if claim == "is in front of the":
                back = re.search(r"is in front of the (\w+ \w+)", scene.caption)
                assert back
                assert depth < by_name[back[1]].mean_depth + 0.5
            elif "near" in claim:
                assert depth < NEAR
            else:
                assert depth > FAR_AWAY
        for number, noun in re.findall(r"(one|two|three|four) (objects?) in front", scene.caption):
            assert ("one", "two", "three", "four").index(number) + 1 == len(scene.objects)
            assert (noun == "object") == (len(scene.objects) == 1)
    assert min(checked[claim] for claim in ("is near", "is far", "is in front of the")) > 2
