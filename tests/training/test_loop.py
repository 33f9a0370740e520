"""Trainings side by side: each computes what it would alone, stops on its own, and fails on its own."""

import errno
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmdiff_cache.errors import StorageError
from mmdiff_cache.training.build import set_up
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.loop import Failures, Reading, run_loop
from mmdiff_cache.training.resolve import resolve
from mmdiff_cache.training.run import flushing_denormals, load_run, opened, train
from tests.learnable import write_store
from tests.training.conftest import TINY, small_config
from tests.training.test_run import assert_same
from tests.training.test_stopping import HARD

SEVERAL: dict[str, dict[str, Any]] = {
    "plain": {"steps": 40},
    "parts": {"steps": 30, "accumulate": 2, "clip": 0.1, "checks": 3, "holdout": 0.5},
    "stops": HARD,
    "wide": {"steps": 20, "aggregator": replace(TINY, width=24, dropout=0.2), "precision": "bfloat16"},
}
COMMON = {"holdout": 0.5}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "few", train=8, test=2)


def side_by_side(store: Path, folder: Path) -> Failures:
    setups = [
        set_up(resolve(small_config(store, folder / name, **{**COMMON, **changes})))
        for name, changes in SEVERAL.items()
    ]
    with ExitStack() as stack, flushing_denormals():
        trainers = []
        for setup in setups:
            path = Path(setup.config.run or "")
            path.mkdir(parents=True, exist_ok=True)
            trainers.append(stack.enter_context(opened(setup, path)))
        return run_loop(trainers, Reading.of(setups[0]), lambda done, total, state: None)


def test_each_computes_what_it_would_alone(store: Path, tmp_path: Path) -> None:
    assert side_by_side(store, tmp_path / "together") == {}
    for name, changes in SEVERAL.items():
        alone = train(small_config(store, tmp_path / "alone" / name, **{**COMMON, **changes}))
        together = load_run(tmp_path / "together" / name)
        assert together.finished
        assert_same(alone, together)
    assert load_run(tmp_path / "together" / "stops").stopped_early


def test_one_whose_best_weights_cannot_be_kept_fails_alone(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others note each check once all the same: early stopping counts them."""
    real = os.replace

    def refuse(source: Path, target: Path) -> None:
        if target.parent.name == "plain" and target.name == "best.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    failures = side_by_side(store, tmp_path)
    assert list(failures) == [tmp_path / "plain"]
    assert isinstance(failures[tmp_path / "plain"], StorageError)
    for name in ("parts", "stops", "wide"):
        assert load_run(tmp_path / name).finished
        checks = [line["step"] for line in read_metrics(tmp_path / name) if "held_out" in line]
        assert checks == sorted(set(checks))
