"""Concept maps against masks: AP against torchmetrics, masks by hand, and maps that are known to be right."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.experiments.concept_maps import (
    AP,
    BOUND,
    CENTRE,
    IOU,
    MAPS,
    OTHER,
    SHUFFLED,
    average_precision,
    concept_map_scores,
    map_scores,
    map_statistics,
)
from mmdiff_cache.experiments.concept_masks import NamedMask, masks_of, named_mask
from mmdiff_cache.experiments.statistics import verdict
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.schema import LabelArray, Vocabulary
from mmdiff_cache.store.writer import open_writer
from tests.learnable import (
    BLOCKS,
    LABELS,
    VOCABULARIES,
    class_grid,
    make_features,
    make_manifest,
    make_sample,
    make_schema,
)

MORE = {
    "structure": ("object", "background"),
    "unified": ("object", "near", "detail"),
    "nothing": ("detail", "surface"),
    "shapes": ("ball", "cone"),
    "absent": ("cone", "detail"),
}
SPECS = {spec.name: spec for spec in LABELS}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_torchmetrics(seed: int) -> None:
    """Of the pixels one by one; values repeat, some tokens have no known pixel."""
    from torchmetrics.functional.classification import binary_average_precision

    rng = np.random.default_rng(seed)
    values = rng.integers(0, 8, 30) / 8
    inside, outside = rng.integers(0, 4, 30), rng.integers(0, 4, 30)
    inside[3], outside[3] = 0, 0
    scores = np.concatenate([np.repeat(values, inside), np.repeat(values, outside)])
    truth = np.repeat([1, 0], [inside.sum(), outside.sum()])
    expected = binary_average_precision(torch.from_numpy(scores), torch.from_numpy(truth))
    assert average_precision(values, inside, outside) == pytest.approx(float(expected), rel=1e-6)


def test_average_precision_by_hand() -> None:
    """In falling order: 2 inside; then 1 inside, 1 outside; then 1 inside, 4 outside."""
    values, inside, outside = np.array([0.9, 0.5, 0.1]), np.array([2, 1, 1]), np.array([0, 1, 4])
    by_hand = 1.0 * 2 / 4 + 3 / 4 * 1 / 4 + 4 / 9 * 1 / 4
    assert average_precision(values, inside, outside) == pytest.approx(by_hand)
    assert average_precision(np.ones(3), inside, outside) == pytest.approx(4 / 9)


def test_iou_is_of_one_threshold_for_all_pictures() -> None:
    """Each picture alone has a threshold that is perfect, but no one threshold is."""
    values = np.array([[0.9, 0.8, 0.1, 0.0], [0.5, 0.4, 0.3, 0.2]])
    inside = np.array([[4, 0, 0, 0], [4, 4, 0, 0]])
    rows = map_statistics(values, inside, 4 - inside)
    found = map_scores(rows.sum(axis=0)[None])
    assert found[AP][0] == 1.0
    best = max(
        np.sum(inside[values >= t]) / (inside.sum() + np.sum((4 - inside)[values >= t]))
        for t in values.ravel()
    )
    assert found[IOU][0] == pytest.approx(best) == pytest.approx(12 / 16)
    for row in rows:
        assert map_scores(row[None])[IOU][0] == 1.0


def test_pictures_without_both_sides_do_not_count() -> None:
    values, inside = np.random.default_rng(0).random((3, 4)), np.array([[4] * 4, [0] * 4, [4, 4, 0, 0]])
    rows = map_statistics(values, inside, 4 - inside)
    assert rows[:, 1].tolist() == [0, 0, 1]
    assert not rows[:2].any()
    assert np.isnan(map_scores(rows[:2].sum(axis=0)[None])[AP][0])


def masked(word: str, label: str, part: str, values: NDArray[np.generic]) -> list[str]:
    """A picture as text: 1 inside, 0 outside, - neither."""
    inside, outside = masks_of(NamedMask(word=word, label=label, part=part), values[None], SPECS[label])
    return [
        "".join("1" if yes else "0" if no else "-" for yes, no in zip(*rows, strict=True))
        for rows in zip(inside[0], outside[0], strict=True)
    ]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("object", ["000-", "0110", "0010"]),
        ("background", ["111-", "1001", "1101"]),
        ("edges", ["011-", "1111", "1111"]),
        ("ball", ["000-", "0110", "0000"]),
        ("ground", ["000-", "0001", "1101"]),
    ],
)
def test_masks_of_classes(word: str, expected: list[str]) -> None:
    """sky 0, ground 1, ball 2, box 3."""
    values = np.array([[0, 0, 0, 255], [0, 2, 2, 1], [1, 1, 3, 1]], np.uint8)
    mask = named_mask(word, SPECS)
    assert mask is not None
    assert mask.label == "segmentation"
    assert masked(word, mask.label, mask.part, values) == expected


def test_masks_of_salience_and_depth() -> None:
    salient = np.array([[0, 0, 0, 0], [0, 1, 1, 255], [0, 0, 0, 0]], np.uint8)
    assert masked("salient", "saliency", "salient object", salient) == ["0000", "011-", "0000"]
    assert masked("contour", "saliency", "its outline", salient) == ["0110", "111-", "0110"]
    metres = np.array([[1.0, 2.0, 3.0, 50.0], [4.0, 0.0, 9.0, 9.0]], np.float32)  # the median is 3.5
    assert masked("near", "depth", "nearer half", metres) == ["111-", "0-00"]
    assert masked("far", "depth", "farther half", metres) == ["000-", "1-11"]


def test_words_take_the_first_label_set_that_shows_them() -> None:
    mask_alone = {"saliency": LabelSpec(name="saliency", kind="mask", ignore=255)}
    found = named_mask("object", mask_alone)
    assert found == NamedMask(word="object", label="saliency", part="salient object")
    assert named_mask("detail", SPECS) is None
    assert named_mask("near", mask_alone) is None


@pytest.fixture(scope="module")
def telling_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve test pictures whose scores of `object` and `background` say which tokens hold an object.

    None of them shows the class `cone`.
    """
    path = tmp_path_factory.mktemp("stores") / "telling"
    words = {**VOCABULARIES, **MORE}
    vocabularies = [
        Vocabulary(name=n, concepts=w, blocks=BLOCKS, map_blocks=BLOCKS[:1]) for n, w in words.items()
    ]
    specs = [replace(spec, classes=(*spec.classes, "cone")) if spec.classes else spec for spec in LABELS]
    labels = tuple(LabelArray(spec=spec, canvas=(64, 64)) for spec in specs)
    schema = make_schema(vocabularies=tuple(vocabularies), labels=labels)
    with open_writer(path, make_manifest(schema, {"test": 12}, "blocks", "empty")) as writer:
        for partition in writer.pending("test"):
            with writer.begin(partition) as out:
                for offset, sample_id in enumerate(out.ids):
                    features, objects = make_features(schema, [sample_id]), class_grid(sample_id) > 1
                    for name in ("segmentation", "structure"):
                        scores = features.concept_scores[name]
                        scores[..., 0, :, :] = 4 * objects
                        scores[..., 1, :, :] = 4 * ~objects
                    out.write(offset, [make_sample(sample_id)], features)
                out.commit()
    return path


def test_maps_that_show_the_labels_are_found_to(telling_store: Path) -> None:
    found = concept_map_scores(telling_store, "segmentation", draws=300)
    assert [one.word for one in found.words] == ["object", "background", "edges"]
    for one in found.words[:2]:
        assert one.scores[MAPS] == one.scores[BOUND] == {AP: 1.0, IOU: 1.0}
        assert one.scores[SHUFFLED][AP] < 0.8
        assert verdict([one.gains[SHUFFLED]]) == verdict([one.gains[CENTRE]]) == "confirmed"
    edges = found.words[2]
    assert edges.scores[MAPS][AP] < edges.scores[BOUND][AP]
    for one in found.words:
        gain = one.scores[MAPS][AP] - one.scores[SHUFFLED][AP]
        assert one.gains[SHUFFLED].estimate == pytest.approx(gain)
    mean = np.mean([one.scores[MAPS][AP] for one in found.words])
    assert found.mean.scores[MAPS][AP] == pytest.approx(mean)
    assert found.mean.gains[SHUFFLED].low > 0


def test_maps_of_noise_are_found_to_be_noise(telling_store: Path) -> None:
    found = concept_map_scores(telling_store, "saliency", draws=300, timesteps=(0.26,))
    assert verdict([found.mean.gains[SHUFFLED]]) == "open"
    assert found.timesteps == (0.26,)


def test_other_words_stand_beside_in_the_same_places(telling_store: Path) -> None:
    """Those of the saliency vocabulary here are noise."""
    found = concept_map_scores(telling_store, "structure", others="saliency", draws=300)
    alone = concept_map_scores(telling_store, "structure", draws=300)
    for one, other in zip(found.words, alone.words, strict=True):
        assert one.scores[OTHER][AP] < 0.8
        assert {name: one.scores[name] for name in other.scores} == other.scores
        assert verdict([one.gains[OTHER]]) == "confirmed"
    assert "other words AP / IoU" in str(found)
    with pytest.raises(ConfigError, match="for each of object, background, edges, got salient, contour"):
        concept_map_scores(telling_store, "segmentation", others="saliency")


def test_words_without_a_mask_are_left_out(telling_store: Path) -> None:
    found = concept_map_scores(telling_store, "unified", draws=50)
    assert found.without_mask == ("detail",)
    assert "without a mask: detail" in str(found)
    with pytest.raises(ConfigError, match=r"no word of 'nothing' \(detail, surface\) names a mask"):
        concept_map_scores(telling_store, "nothing")


def test_words_whose_mask_no_picture_shows_are_left_out(telling_store: Path) -> None:
    """Nor do they count in the mean: a few pictures show few classes."""
    found = concept_map_scores(telling_store, "shapes", draws=50)
    assert ([one.word for one in found.words], found.not_shown) == (["ball"], ("cone",))
    assert found.mean.scores == found.words[0].scores
    assert "in no picture: cone" in str(found)
    with pytest.raises(DataError, match=r"none of the 12 pictures of test .* a word of 'absent'"):
        concept_map_scores(telling_store, "absent")


def test_the_result_is_a_table_and_json_and_repeats(telling_store: Path) -> None:
    found = concept_map_scores(telling_store, "segmentation", draws=100)
    again = concept_map_scores(open_store(telling_store), "segmentation", draws=100)
    assert json.dumps(found.to_json()) == json.dumps(again.to_json())
    for word in ("| object |", "| mean |", "shuffled AP / IoU", "t = 0.78, 0.26, 0.001"):
        assert word in str(found)
