"""Trainings side by side: each computes what it would alone, stops on its own, and fails on its own."""

import errno
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmdiff_cache.errors import DamageError, StorageError, TrainingError
from mmdiff_cache.training.build import set_up
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.loop import Failures, Reading, run_loop
from mmdiff_cache.training.resolve import resolve
from mmdiff_cache.training.run import flushing_denormals, load_run, opened, train
from mmdiff_cache.training.trainer import Trainer
from tests.learnable import write_store
from tests.training.conftest import TINY, small_config
from tests.training.test_run import Stop, assert_same, stop_at
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


def silent(done: int, total: int, state: str) -> None:
    """No progress wanted."""


@contextmanager
def trainers_of(
    store: Path, folder: Path, several: dict[str, dict[str, Any]]
) -> Iterator[tuple[list[Trainer], Reading]]:
    setups = [
        set_up(resolve(small_config(store, folder / name, **{**COMMON, **changes})))
        for name, changes in several.items()
    ]
    with ExitStack() as stack, flushing_denormals():
        trainers = []
        for setup in setups:
            path = Path(setup.config.run or "")
            path.mkdir(parents=True, exist_ok=True)
            trainers.append(stack.enter_context(opened(setup, path)))
        yield trainers, Reading.of(setups[0])


def side_by_side(store: Path, folder: Path) -> Failures:
    with trainers_of(store, folder, SEVERAL) as (trainers, reading):
        return run_loop(trainers, reading, silent)


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


DIVERGING: dict[str, dict[str, Any]] = {
    "steady": {"steps": 30},
    "diverging": {"steps": 30, "learning_rate": 1e30},
}


def test_what_a_failed_one_had_in_memory_is_free_at_once(store: Path, tmp_path: Path) -> None:
    """Weights, gradients and the optimiser's averages, while the others go on."""
    with trainers_of(store, tmp_path, DIVERGING) as (trainers, reading):
        held = [weakref.ref(next(trainer.model.parameters())) for trainer in trainers]
        alive: list[list[bool]] = []

        def look(done: int, total: int, state: str) -> None:
            alive.append([one() is not None for one in held])

        (failed,) = run_loop(trainers, reading, look)
    assert failed.name == "diverging"
    assert alive[0] == [True, True]
    assert alive[-2] == [True, False]
    assert load_run(tmp_path / "steady").finished


def test_a_reading_that_fails_does_not_hide_what_failed_before(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Reading.batches

    def breaking(self: Reading, start: int, stop: int) -> Iterator[Any]:
        for step, one in enumerate(batches(self, start, stop)):
            if step == 25:
                raise DamageError("chunk 7 does not match its record")
            yield one

    monkeypatch.setattr(Reading, "batches", breaking)
    with trainers_of(store, tmp_path, {**DIVERGING, "short": {"steps": 20}}) as (trainers, reading):
        failures = {folder.name: error for folder, error in run_loop(trainers, reading, silent).items()}
    assert {name: type(error) for name, error in failures.items()} == {
        "diverging": TrainingError,
        "steady": DamageError,
    }
    assert load_run(tmp_path / "short").finished


def test_the_clock_of_one_that_waits_for_others_stands_still(store: Path, tmp_path: Path) -> None:
    """The first goes on at step 8, the second begins; what the first waits is not its own time. Both end as
    they do alone.
    """
    config = small_config(store, tmp_path / "ahead", **COMMON, steps=12, checks=6)
    with pytest.raises(Stop):
        train(config, progress=stop_at(9))
    two = {"ahead": {"steps": 12, "checks": 6}, "behind": {"steps": 12, "checks": 6}}
    with trainers_of(store, tmp_path, two) as (trainers, reading):

        def slow(done: int, total: int, state: str) -> None:
            if done <= 8:
                time.sleep(0.5)

        assert run_loop(trainers, reading, slow) == {}
    speeds = [line["samples_per_second"] for line in read_metrics(tmp_path / "ahead") if "loss" in line]
    assert speeds[8] > 4 / 2  # a batch of 4, after four seconds of waiting
    alone = train(replace(config, run=str(tmp_path / "alone")))
    for name in two:
        assert_same(alone, load_run(tmp_path / name))
