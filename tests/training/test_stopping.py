"""A training that waits in vain for a better held-out score stops, says so, and does so exactly once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.optim import rate_factor
from mmdiff_cache.training.run import Run, load_run, train
from tests.learnable import write_store
from tests.training.conftest import small_config
from tests.training.test_run import Stop, assert_same, stop_at

STEPS, CHECKS, PATIENCE = 60, 30, 3
HARD = {"steps": STEPS, "checks": CHECKS, "patience": PATIENCE, "learning_rate": 0.3, "holdout": 0.5}
"""At such a rate on such few samples the held-out score soon goes down."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "few", train=8, test=2)


@pytest.fixture(scope="module")
def stopped(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(small_config(store, tmp_path_factory.mktemp("runs") / "stopped", **HARD))


def curve(run: Run) -> dict[int, float]:
    return {
        line["step"]: line["held_out"]["ema"]["miou"] for line in read_metrics(run.path) if "held_out" in line
    }


def test_it_stops_after_so_many_checks_without_a_better_score(stopped: Run) -> None:
    scores = curve(stopped)
    best = max(scores, key=lambda step: (scores[step], -step))
    assert stopped.step == best + PATIENCE * STEPS // CHECKS == max(scores) < STEPS
    assert stopped.finished
    assert stopped.stopped_early
    assert checkpoint.read_header(stopped.path / "best.safetensors").step == best
    for step in scores:  # and never before
        since = [scores[s] for s in scores if s <= step]
        waited = len(since) - 1 - since.index(max(since))
        assert (waited == PATIENCE) == (step == stopped.step)


def test_it_says_why(stopped: Run) -> None:
    why = f"stopped early at step {stopped.step}: 3 checks without a better held-out miou"
    assert why in str(stopped)
    assert why in (stopped.path / "train.log").read_text()
    found = evaluate(stopped)
    assert f"{stopped.step} steps ({why})" in str(found)
    assert found.to_json()["ending"] == why


def test_the_rate_follows_the_full_length(stopped: Run) -> None:
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(stopped.path) if "loss" in line}
    assert rates == {step: 0.3 * rate_factor(step - 1, steps=STEPS) for step in range(1, stopped.step + 1)}


def test_going_on_does_nothing(stopped: Run) -> None:
    before = {path: path.read_bytes() for path in stopped.path.glob("*.*") if path.name != "train.log"}
    again = train(stopped.config, progress=stop_at(stopped.step + 1))
    assert again.step == stopped.step
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("after", [0, 1])
def test_what_was_waited_survives_an_interruption(
    store: Path, stopped: Run, tmp_path: Path, after: int
) -> None:
    """Interrupted at every check that counted, or one step later, which is then done twice."""
    config = small_config(store, tmp_path / "run", **HARD)
    for step in sorted(curve(stopped))[-PATIENCE - 1 : -1]:
        with pytest.raises(Stop):
            train(config, progress=stop_at(step + after))
        assert not load_run(tmp_path / "run").finished
    assert_same(stopped, train(config))


def test_without_patience_it_takes_every_step(stopped: Run, store: Path, tmp_path: Path) -> None:
    run = train(small_config(store, tmp_path / "run", **{**HARD, "patience": None}))
    assert run.step == STEPS
    assert not run.stopped_early
    scores = curve(run)
    assert {step: scores[step] for step in curve(stopped)} == curve(stopped)
    assert "finished" in str(run)


@pytest.mark.parametrize(("steps", "checks", "expected"), [(12, 5, 5), (7, 10, 7), (10, 1, 1), (9, 4, 4)])
def test_there_are_as_many_checks_as_asked_for_and_the_last_is_at_the_end(
    trained: Callable[[str], Run], store: Path, tmp_path: Path, steps: int, checks: int, expected: int
) -> None:
    run = train(small_config(store, tmp_path / "run", steps=steps, checks=checks))
    found = list(curve(run))
    assert len(found) == expected
    assert found[-1] == steps
    gaps = [b - a for a, b in zip([0, *found], found, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_a_run_from_before_there_was_patience_loads(trained: Callable[[str], Run], tmp_path: Path) -> None:
    """A header without the count, as former versions wrote it."""
    path = trained("segmentation").path / "last.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["mmdiff_cache"])
    del inner["checks_since_best"]
    for name in ("patience", "checks", "clip", "accumulate"):
        del inner["config"][name]
    outer["__metadata__"]["mmdiff_cache"] = json.dumps(inner)
    header = json.dumps(outer).encode()
    (tmp_path / "last.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + data[8 + length :]
    )
    run = load_run(tmp_path)
    assert run.config == trained("segmentation").config.__class__.from_json(
        {**trained("segmentation").config.to_json(), "run": str(tmp_path)}
    )
    assert run.finished
