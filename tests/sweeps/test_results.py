"""What stands in one cell of a table was taken in one way, of the run as it is now."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mmdiff_cache.cli.app import run as command
from mmdiff_cache.config import TrainConfig
from mmdiff_cache.sweeps import compare, sweep
from mmdiff_cache.sweeps.plan import plan_sweep
from mmdiff_cache.sweeps.results import read_result
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.run import train
from tests.learnable import write_store
from tests.sweeps.conftest import quick
from tests.training.test_run import Stop, stop_at


def seeds(store: Path) -> list[TrainConfig]:
    return [quick(store, task="depth", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def steady(learnable_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep; tests take copies."""
    return sweep(seeds(learnable_store), tmp_path_factory.mktemp("sweeps") / "steady").path


@pytest.fixture
def swept(steady: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(steady, tmp_path / "sweep"))


def test_scores_on_another_split_do_not_enter_the_table(learnable_store: Path, swept: Path) -> None:
    """What `evaluate` scores later is shown by `compare`, in columns of its own."""
    before = (swept / "table.csv").read_bytes()
    folder = plan_sweep(seeds(learnable_store), swept).runs[0].folder
    train_scores = evaluate(folder, split="train").scores
    sweep(seeds(learnable_store), swept)
    assert (swept / "table.csv").read_bytes() == before
    shown = compare([swept])
    assert {"test abs_rel", "train abs_rel"} <= set(shown.header())
    at = shown.header().index("train abs_rel")
    assert [line[at] for line in shown.cells()] == [f"{train_scores['abs_rel']:.4f}", "-"]
    assert all(line[shown.header().index("test abs_rel")] != "-" for line in shown.cells())


def test_scores_of_an_earlier_step_are_not_those_of_the_run(learnable_store: Path, tmp_path: Path) -> None:
    config = quick(learnable_store, run=str(tmp_path / "run"), task="depth")
    with pytest.raises(Stop):
        train(config, progress=stop_at(2))
    early = evaluate(tmp_path / "run").scores["abs_rel"]
    assert read_result(tmp_path / "run").scores["test"]["abs_rel"] == early
    train(config)
    assert "test" not in read_result(tmp_path / "run").scores
    late = evaluate(tmp_path / "run").scores["abs_rel"]
    assert read_result(tmp_path / "run").scores["test"]["abs_rel"] == late != early


def test_a_run_whose_scores_are_lost_is_scored_again(learnable_store: Path, swept: Path) -> None:
    before = (swept / "table.csv").read_bytes()
    one, other = swept.glob("*/scores-test.json")
    one.write_text("{")
    other.write_text(json.dumps({**json.loads(other.read_text()), "step": 1}))
    plan = plan_sweep(seeds(learnable_store), swept)
    assert [run.state for run in plan.runs] == ["finished", "finished"]
    assert sweep(plan).table.rows
    assert (swept / "table.csv").read_bytes() == before


def test_a_store_without_a_test_split_is_scored_on_val_and_says_so(tmp_path: Path) -> None:
    result = sweep(seeds(write_store(tmp_path / "store", train=8, scored="val")), tmp_path / "sweep")
    assert "val abs_rel" in result.table.header()
    assert not any("test" in name for name in result.table.header())


def test_counts_are_no_scores_and_the_protocol_is_told(learnable_store: Path, swept: Path) -> None:
    result = sweep(seeds(learnable_store), swept)
    assert not any("samples" in name or "skipped" in name for name in result.table.header())
    with (result.path / "table.csv").open() as file:
        assert not any("samples" in name for name in csv.DictReader(file).fieldnames or ())
    assert len(result.table.protocols) == 2
    assert "held-out: samples of the training split" in result.table.protocols[0]
    folder = plan_sweep(seeds(learnable_store), result.path).runs[0].folder
    expected = f"depth on blocks test, features of flux-tiny, prompts empty: {evaluate(folder).protocol}"
    assert result.table.protocols[1] == expected
    assert expected in (result.path / "table.md").read_text()


def test_a_mean_over_fewer_seeds_says_so(learnable_store: Path, swept: Path) -> None:
    next(swept.glob("*/scores-test.json")).unlink()
    table = sweep(plan_sweep(seeds(learnable_store), swept, evaluate=False)).table
    (line,) = table.cells()
    assert line[table.header().index("test abs_rel")].endswith(" (1 of 2)")
    assert "of 2" not in line[table.header().index("held-out abs_rel")]


def test_each_task_has_a_table_of_its_own(
    learnable_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [
        quick(learnable_store, task=task, seed=seed) for task in ("depth", "segmentation") for seed in (0, 1)
    ]
    configs = [replace(config, timesteps=(0.26,) * (1 + config.seed)) for config in configs]
    result = sweep(configs, tmp_path / "sweep")
    depth, segmentation = result.table.by_task().values()
    assert depth.columns == segmentation.columns == ("timesteps",)
    assert not any("miou" in name for name in depth.header())
    assert not any("abs_rel" in name for name in segmentation.header())
    assert command(["compare", str(result.path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {"depth", "segmentation"} <= set(printed)
    names = [run.folder.name for run in plan_sweep(configs, result.path).runs]
    for name in names:  # whole, in one line with the numbers
        (line,) = (line for line in printed if line.startswith(name))
        assert len(line.split()) > 5
        assert line.split()[1] in ("0.26", "0.26,0.26")
    assert "concept_maps" not in "".join(printed)
