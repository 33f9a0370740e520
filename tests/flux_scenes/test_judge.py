"""The judge's rules on hand-made readings, and the scores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdiff_cache.flux_scenes.corpus import Corpus, read_images
from mmdiff_cache.flux_scenes.judge import (
    IGNORE,
    Judge,
    JudgeRecipe,
    Truths,
    colour_mask,
    load_judge,
    read,
    save_judge,
    train_judge,
)
from mmdiff_cache.flux_scenes.sample import nearest, sheet
from mmdiff_cache.flux_scenes.verdict import (
    Content,
    chance,
    claimed,
    contents,
    find_objects,
    headline,
    patches,
    score,
    shift,
)
from mmdiff_cache.scenes import CLASS_NAMES, COLOURS, HELD_OUT_PAIRS, render_scene

CPU = torch.device("cpu")


def maps() -> tuple[Tensor, Tensor]:
    """A red ball at the left, a blue box and a blue cone touching at the right, and a speck of green."""
    classes = torch.full((len(CLASS_NAMES), 32, 32), -5.0)
    colours = torch.full((len(COLOURS), 32, 32), -5.0)
    classes[CLASS_NAMES.index("ground")] = -1.0

    def paint(shape: str, colour: str, rows: slice, columns: slice) -> None:
        classes[CLASS_NAMES.index(shape), rows, columns] = 0.0
        colours[COLOURS.index(colour), rows, columns] = 0.0

    paint("ball", "red", slice(4, 12), slice(2, 10))
    paint("box", "blue", slice(4, 12), slice(16, 22))
    paint("cone", "blue", slice(4, 12), slice(22, 28))
    paint("ball", "green", slice(20, 23), slice(20, 23))
    return classes, colours


def test_objects_are_patches_of_one_colour_and_specks_are_none() -> None:
    assert sorted(find_objects(*maps())) == [("blue", "box"), ("blue", "cone"), ("red", "ball")]


def test_a_sliver_of_another_shape_is_no_object() -> None:
    classes, colours = maps()
    classes[:, 4:12, 22:28] = -5.0
    classes[CLASS_NAMES.index("box"), 4:12, 22:28] = 0.0
    classes[CLASS_NAMES.index("prism"), 4:12, 27:28] = 1.0
    assert sorted(find_objects(classes, colours)) == [("blue", "box"), ("red", "ball")]


def test_patches_are_connected_by_sides_only() -> None:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = mask[1, 2] = mask[2, 2] = True
    assert sorted(int(patch.sum()) for patch in patches(mask)) == [1, 3]
    assert patches(torch.zeros(4, 4, dtype=torch.bool)) == []


def test_scores_count_pairs_pictures_and_precision() -> None:
    wanted = Content(pairs=(("red", "ball"), ("blue", "box")), ground="sand", time="day")
    half = Content(pairs=(("red", "ball"), ("pink", "box")), ground="sand", time="night")
    none = Content(pairs=(), ground="snow", time="day")
    found = score([wanted, wanted], [half, none])
    assert found["pairs"] == 0.25
    assert found["count"] == 0.5
    assert found["ground"] == found["time"] == 0.5
    assert found["precision"] == 0.5
    assert found["colours"] == 0.25
    assert found["mean"] == 0.4375
    perfect, nothing = score([wanted], [wanted]), dict.fromkeys(found, 0.0)
    assert headline(perfect, nothing, perfect)["pairs"] == 1.0
    assert shift([wanted, half, none]) == [half, none, wanted]


def test_chance_is_what_other_claims_have_in_common() -> None:
    """Of six pairs of unlike claims two share the ground, two the time, two an object count of two."""
    one = Content(pairs=(("red", "ball"), ("blue", "box")), ground="sand", time="day")
    other = Content(pairs=(("red", "ball"), ("pink", "box")), ground="sand", time="night")
    third = Content(pairs=(("green", "cone"),), ground="snow", time="day")
    found = chance([one, other, third])
    assert found["ground"] == found["time"] == found["count"] == pytest.approx(1 / 3)
    assert found["pairs"] == pytest.approx(2 / 10)


def test_claims_come_from_the_scene_and_colours_only_where_they_are_certain() -> None:
    for index in range(8):
        scene = render_scene("test", index, 64)
        claim = claimed(scene)
        assert len(claim.pairs) == len(scene.objects)
        assert claim.ground == scene.ground
        mask = colour_mask(scene)
        for colour, shape in claim.pairs:
            of_shape = {one.colour for one in scene.objects if one.shape == shape}
            inside = mask[scene.class_mask == CLASS_NAMES.index(shape)]
            expected = {COLOURS.index(colour)} if len(of_shape) == 1 else {IGNORE}
            assert set(inside.tolist()) <= expected


def test_pretraining_never_shows_a_held_out_pair_but_the_judge_does() -> None:
    held_out = set(HELD_OUT_PAIRS)
    for index in range(80):
        assert held_out.isdisjoint(claimed(render_scene("pretrain", index, 16)).pairs)
    judged = [claimed(render_scene("judge", index, 16)).pairs for index in range(80)]
    assert any(held_out & set(pairs) for pairs in judged)


def test_judge_trains_reads_and_survives_the_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truths = Truths(
        pictures=rng.integers(0, 255, (4, 32, 32, 3), np.uint8),
        classes=rng.integers(0, 8, (4, 16, 16), np.uint8),
        colours=rng.integers(0, 8, (4, 16, 16), np.uint8),
        grounds=np.zeros(4, np.uint8),
        times=np.ones(4, np.uint8),
    )
    judge = train_judge(truths, JudgeRecipe(scenes=4, steps=3, batch=2), device=CPU)
    save_judge(judge, tmp_path / "judge.safetensors")
    first, second = (
        read(one, truths.pictures, device=CPU) for one in (judge, load_judge(tmp_path / "judge.safetensors"))
    )
    torch.testing.assert_close(first.classes, second.classes, atol=0.02, rtol=0.02)
    assert first.classes.shape == (4, len(CLASS_NAMES), 16, 16)
    assert len(contents(first)) == 4
    assert isinstance(judge, Judge)


def test_nearest_scene_of_a_mirrored_copy_is_its_original(tiny_corpus: Corpus) -> None:
    pictures = np.stack([read_images(tiny_corpus, 1)[2], read_images(tiny_corpus, 0)[3][:, ::-1]])
    assert [number for number, _ in nearest(pictures, tiny_corpus)] == [8, 3]
    assert sheet([pictures, pictures[:1]]).size == (70, 70)
