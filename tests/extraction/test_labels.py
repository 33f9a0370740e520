"""Labels of one's own, from a folder into a store, and a head trained on them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.cli.app import run
from mmdiff_cache.config import TrainConfig
from mmdiff_cache.datasets.transforms import resize_nearest
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.verify import verify
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.run import train


@pytest.fixture
def store(learnable_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(learnable_store, tmp_path / "store"))


@pytest.fixture
def folder(store: Path, tmp_path: Path) -> Path:
    """The left half is 0, the right 1, in twice the network's size; the first training sample has none."""
    rows, columns = (2 * side for side in open_store(store).manifest.schema.image_size)
    values = np.zeros((rows, columns), np.uint8)
    values[:, columns // 2 :] = 1
    for split in open_store(store).splits:
        (tmp_path / "labels" / split).mkdir(parents=True)
        for name in open_store(store)[split].ids:
            Image.fromarray(values).save(tmp_path / "labels" / split / f"{name}.png")
    next(iter(sorted((tmp_path / "labels" / "train").iterdir()))).unlink()
    return tmp_path / "labels"


def add(store: Path, folder: Path, *more: str) -> int:
    words = ["labels", "add", str(store), "--name", "halves", "--from", str(folder)]
    return run([*words, "--classes", "left,right", *more])


def test_they_are_added_and_trained_on(
    store: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add(store, folder) == 0
    said = capsys.readouterr().out
    assert "1 without a file" in said
    assert "mmdiff-cache train --task segmentation --set label=halves" in said
    reader = open_store(store)["train"]
    original = reader.original_label("halves", 1)
    assert original.shape == tuple(2 * side for side in open_store(store).manifest.schema.image_size)
    np.testing.assert_array_equal(
        reader.labels("halves", [1])[0], resize_nearest(original, original.shape[0] // 2)
    )
    assert verify(store).sound
    config = TrainConfig(
        task="segmentation",
        label="halves",
        stores=(str(store),),
        run=str(tmp_path / "run"),
        steps=2,
        concepts="none",
    )
    result = evaluate(train(config))
    assert (result.label, result.headline, set(result.scores["iou"])) == ("halves", "miou", {"left", "right"})
    with pytest.raises(ConfigError, match="needs labels of kind depth, 'halves' are classes"):
        train(replace(config, task="depth", run=str(tmp_path / "other")))


def test_a_file_that_cannot_be_used_is_named_and_the_rest_is_kept(
    store: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = sorted((folder / "train").iterdir())[0]
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(bad)
    assert add(store, folder) == 3
    assert "has the value 7, which is no class" in capsys.readouterr().out
    assert open_store(store)["train"].state(1, "halves") == "failed"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--kind", "depth"), "have no classes"),
        (("--kind", "boxes"), "classes, mask, depth"),
        (("--ignore", "300"), "ignore is an id from 0 to 255"),
    ],
)
def test_impossible_labels_are_refused(
    store: Path, folder: Path, more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add(store, folder, *more) == 2
    assert words in capsys.readouterr().err


def test_a_folder_without_any_of_them_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none").mkdir()
    assert add(store, tmp_path / "none") == 2
    assert "has no label for any sample" in capsys.readouterr().err
    assert "halves" not in open_store(store)["train"].label_specs
