"""What a run keeps of every test picture gives its scores again, and says what it is of."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmdiff_cache.errors import CheckpointError, ConfigError
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.protocol import Way
from mmdiff_cache.training.run import Run
from mmdiff_cache.training.statistics import read_statistics

EMA = Way(split="test", weights="ema", align="none", flip=False)


@pytest.mark.parametrize("task", ["segmentation", "saliency", "depth"])
def test_the_scores_are_those_of_the_sum(
    trained: Callable[[str], Run], learnable_store: Path, task: str
) -> None:
    run = trained(task)
    result = evaluate(run)
    kept = read_statistics(run.path, task, EMA)
    metric = kept.about.metric()
    for values in kept.values:
        metric.add(values)
    assert metric.scores() == result.scores
    assert kept.sample_ids == tuple(result.per_sample)
    assert (kept.about.protocol, kept.about.step) == (result.protocol, run.step)
    assert result.headline in kept.about.scores
    reader = open_store(learnable_store)["test"]
    assert kept.contents == tuple(reader.content_hash(n) for n in range(len(reader)))


def test_every_way_has_a_file_of_its_own(trained: Callable[[str], Run]) -> None:
    run = trained("depth")
    evaluate(run, align="median", weights="raw", split="train")
    way = Way(split="train", weights="raw", align="median", flip=False)
    about = read_statistics(run.path, "depth", way).about
    assert (about.split, about.weights, about.align) == ("train", "raw", "median")
    assert "ratio of the medians" in about.protocol


def test_anyone_can_read_it_and_nothing_else_is_left(trained: Callable[[str], Run]) -> None:
    run = trained("saliency")
    evaluate(run)
    with np.load(run.path / "statistics-saliency-test-ema.npz", allow_pickle=False) as archive:
        assert set(archive) == {"sample_ids", "contents", "values", "about"}
        assert json.loads(str(archive["about"]))["scores"] == ["s_measure", "max_f", "mae"]
    assert not list(run.path.glob(".*"))


def test_a_run_that_was_not_scored_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no statistics of depth on test-ema; 'mmdiff-cache evaluate"):
        read_statistics(tmp_path, "depth", EMA)


def _archive(**changes: object) -> bytes:
    label = {"name": "depth", "kind": "depth", "valid_range": [0.1, 40.0]}
    about = {"task": "depth", "label": label, "data_set": "blocks", "split": "test", "weights": "ema",
             "align": "none", "flip": False, "protocol": "", "step": 1, "scores": ["rmse"]}  # fmt: skip
    arrays = {
        "sample_ids": np.array(["a"]),
        "contents": np.array(["b"]),
        "values": np.zeros((1, 8)),
        "about": np.array(json.dumps(about)),
    }
    file = io.BytesIO()
    np.savez(file, **(arrays | changes))  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an archive",
        _archive()[:400],
        _archive(values=np.zeros((1, 7))),
        _archive(values=np.zeros((2, 8))),
        _archive(values=np.array([[None] * 8])),  # a pickle
        _archive(about=np.array("[" * 100_000)),
        _archive(about=np.array("{}")),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "statistics-depth-test-ema.npz"
    file.write_bytes(_archive())
    assert read_statistics(tmp_path, "depth", EMA).sample_ids == ("a",)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="delete it, and evaluate the run again"):
        read_statistics(tmp_path, "depth", EMA)
