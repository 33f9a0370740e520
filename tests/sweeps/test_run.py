"""A sweep isolates its failures, goes on where it stopped, and does not depend on how its list is written."""

import csv
import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.errors import ConfigError, DamageError
from mmdiff_cache.sweeps import compare, part, sweep
from mmdiff_cache.sweeps.plan import SweepPlan, plan_sweep
from mmdiff_cache.sweeps.run import SweepResult
from mmdiff_cache.training.build import Setup
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.loop import Reading
from tests.sweeps.conftest import contents, quick


def grid(store: Path) -> list[TrainConfig]:
    return [quick(store, timesteps=times, seed=seed) for times in ((0.26,), (0.78, 0.26)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def steady(learnable_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """A sweep that nothing disturbed."""
    return sweep(grid(learnable_store), tmp_path_factory.mktemp("sweeps") / "steady")


def weights(folder: Path) -> dict[str, bytes]:
    """The tensors of a run's checkpoints, without the headers, which tell the folder."""
    found = {}
    for name in ("last.safetensors", "best.safetensors"):
        data = (folder / name).read_bytes()
        found[name] = data[8 + int.from_bytes(data[:8], "little") :]
    return found


def all_weights(result: SweepResult) -> dict[str, dict[str, bytes]]:
    return {file.parent.name: weights(file.parent) for file in result.path.glob("*/last.safetensors")}


class Stop(KeyboardInterrupt):
    """Ctrl-C, out of the progress callback."""


def stop_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, state: str) -> None:
        if done == step:
            raise Stop

    return progress


def test_it_ends_with_a_table_of_means_over_seeds(steady: SweepResult) -> None:
    assert steady.table.columns == ("timesteps",)
    assert [row.seeds for row in steady.table.rows] == [2, 2]
    lines = list(csv.DictReader((steady.path / "table.csv").read_text().splitlines()))
    runs = json.loads(json.dumps(compare([steady.path]).to_json()))["runs"]
    for line, row in zip(lines, steady.table.rows, strict=True):
        own = [run["scores"]["test"]["miou"] for run in runs
               if ",".join(f"{t:g}" for t in run["config"]["timesteps"]) == line["timesteps"]]  # fmt: skip
        assert len(own) == 2
        assert float(line["test miou mean"]) == pytest.approx(sum(own) / 2)
        assert float(line["test miou std"]) == pytest.approx(abs(own[0] - own[1]) / 2**0.5)
        assert row.scores["test"]["miou"].mean == float(line["test miou mean"])
    assert (steady.path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "± " in (steady.path / "table.md").read_text()


def test_it_keeps_the_same_of_every_test_picture_as_evaluate(steady: SweepResult) -> None:
    for file in steady.path.glob("*/scores-test.json"):
        kept = file.parent / "statistics-segmentation-test-ema.npz"
        before = kept.read_bytes()
        assert evaluate(file.parent).scores == json.loads(file.read_text())["scores"]
        assert kept.read_bytes() == before


def test_the_order_of_the_list_changes_nothing(
    steady: SweepResult, learnable_store: Path, tmp_path: Path
) -> None:
    turned = sweep(grid(learnable_store)[::-1], tmp_path / "turned")
    assert all_weights(turned) == all_weights(steady)
    assert {row.title: row for row in turned.table.rows} == {row.title: row for row in steady.table.rows}


def test_little_memory_means_more_readings_and_the_same_runs(
    steady: SweepResult, learnable_store: Path, tmp_path: Path
) -> None:
    plan = plan_sweep(grid(learnable_store), tmp_path / "narrow", memory_bytes=1)
    assert [len(part) for part in plan.parts] == [1, 1, 1, 1]
    assert "4 (1 with memory for all)" in str(plan)
    assert all_weights(sweep(plan)) == all_weights(steady)


@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupted_sweep_ends_with_the_same_runs(
    steady: SweepResult, learnable_store: Path, tmp_path: Path, step: int
) -> None:
    out = tmp_path / "interrupted"
    with pytest.raises(Stop):
        sweep(grid(learnable_store), out, progress=stop_at(step))
    assert all(run.state == "going on" for run in plan_sweep(grid(learnable_store), out).runs)
    again = sweep(grid(learnable_store), out)
    assert all_weights(again) == all_weights(steady)
    assert again.table == steady.table


def test_finished_runs_are_kept_and_a_longer_list_adds(
    steady: SweepResult, learnable_store: Path, tmp_path: Path
) -> None:
    first = sweep(grid(learnable_store)[:1], tmp_path / "growing")
    before = {path: path.stat().st_mtime_ns for path in first.path.glob("*/last.safetensors")}
    plan = plan_sweep(grid(learnable_store)[:2] + grid(learnable_store)[:1], first.path)
    assert sorted(run.state for run in plan.runs) == ["new", "scored"]
    assert plan.repeated == 1
    longer = sweep(plan)
    assert len(longer.table.rows) == 1
    assert longer.table.rows[0].seeds == 2
    assert before == {path: path.stat().st_mtime_ns for path in before}
    nothing = plan_sweep(grid(learnable_store)[:2], first.path)
    assert nothing.parts == ()
    assert sweep(nothing).table == longer.table


def test_one_that_fails_leaves_the_others_as_they_are(
    steady: SweepResult, learnable_store: Path, tmp_path: Path
) -> None:
    diverging = quick(learnable_store, learning_rate=1e30, steps=20)
    unknown = quick(learnable_store, layers=("single.99",))
    late = quick(learnable_store, decoder="nonesuch")
    plan = plan_sweep([diverging, unknown, late, *grid(learnable_store)], tmp_path / "mixed")
    result = sweep(plan)
    ours = {folder.name.rsplit("-", 1)[1]: weights(folder) for folder in steady.path.glob("*_*-*")}
    theirs = {
        folder.name.rsplit("-", 1)[1]: weights(folder)
        for folder in (file.parent for file in result.path.glob("*/last.safetensors"))
    }
    assert {name: theirs[name] for name in ours} == ours
    reasons = "\n".join(result.failed.values())  # one line each
    assert len(result.failed) == 3
    assert "the loss became" in reasons
    assert "'single.99' is not in" in reasons
    assert "decoder must be one of" in reasons
    assert json.loads((result.path / "sweep.json").read_text())["failed"] == result.failed
    assert len(result.table.rows) == 2


def test_scores_that_cannot_be_written_are_that_runs_failure(
    learnable_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are scored, and the same command scores this one."""
    real, plan = os.replace, plan_sweep(grid(learnable_store)[:2], tmp_path / "sweep")
    unlucky = plan.runs[0].folder

    def refuse(source: Path, target: Path) -> None:
        if target == unlucky / "scores-test.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        result = sweep(plan)
    assert list(result.failed) == [unlucky.name]
    assert "no space left on device" in result.failed[unlucky.name]
    again = plan_sweep(grid(learnable_store)[:2], tmp_path / "sweep")
    assert [run.state for run in again.runs] == ["finished", "scored"]
    assert not sweep(again).failed


def test_a_reading_that_cannot_begin_stops_no_other(
    learnable_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = grid(learnable_store)[0], replace(grid(learnable_store)[0], order_seed=1)
    real = part.shared_reading

    def refuse(setups: Sequence[Setup]) -> Reading:
        if setups[0].config.order_seed == 0:
            raise DamageError("chunk 7 does not match its record")
        return real(setups)

    monkeypatch.setattr(part, "shared_reading", refuse)
    result = sweep([first, second], tmp_path / "sweep")
    assert list(result.failed.values()) == ["chunk 7 does not match its record"]
    assert [row.seeds for row in result.table.rows] == [1]


def test_only_runs_of_the_same_samples_and_order_share(learnable_store: Path, tmp_path: Path) -> None:
    def readings(*configs: TrainConfig) -> int:
        return len(plan_sweep(configs, tmp_path).parts)

    one = quick(learnable_store)
    assert readings(one, replace(one, seed=1, learning_rate=1e-3)) == 1
    for change in ({"order_seed": 1}, {"batch_size": 2}, {"limit": 8}, {"holdout": 0.3}):
        assert readings(one, replace(one, **change)) == 2
    assert readings(replace(one, order_seed=None), replace(one, order_seed=None, seed=1)) == 2


def test_workers_get_something_each(learnable_store: Path, tmp_path: Path) -> None:
    plan = plan_sweep(grid(learnable_store), tmp_path)
    for workers, sizes in ((1, [4]), (2, [2, 2]), (3, [1, 1, 2]), (9, [1, 1, 1, 1])):
        assert sorted(len(part) for part in plan.divided(workers)) == sizes


def test_what_cannot_be_is_said(learnable_store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one configuration"):
        plan_sweep([], tmp_path)
    with pytest.raises(ConfigError, match="neither a run with a checkpoint"):
        compare([tmp_path])
    refused = plan_sweep([quick(learnable_store, layers=("single.99",))], tmp_path)
    assert isinstance(refused, SweepPlan)
    assert refused.runs == ()
    result = sweep(refused)
    assert len(result.failed) == 1
    assert result.table.rows == ()


@pytest.mark.slow
def test_two_workers_give_the_same_bytes(steady: SweepResult, learnable_store: Path, tmp_path: Path) -> None:
    result = sweep(grid(learnable_store), tmp_path / "spread", workers=2)
    assert not result.failed
    assert all_weights(result) == all_weights(steady)
    assert contents(next(result.path.glob("*/last.safetensors")).parent)
    assert result.table == steady.table
