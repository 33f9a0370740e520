"""A table from the data to the figures: what can be run is run once, what cannot is told, nothing is lost."""

import csv
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.experiments import Claim, Row, Table, World
from mmdiff_cache.experiments.outcome import score_name
from mmdiff_cache.experiments.plan import TablePlan, plan_table
from mmdiff_cache.experiments.result import TableResult
from mmdiff_cache.experiments.run import run_table
from mmdiff_cache.experiments.world import CLEAREST
from mmdiff_cache.records import Progress
from mmdiff_cache.sweeps.results import SCORES
from mmdiff_cache.training.checkpoint import LAST
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.run import model_for_run

Bar = Callable[[str], AbstractContextManager[Progress]]
SINGLE, FOUR, DINO, BROKEN, BOTH = "one t", "four t", "with an encoder", "broken", "both at once"
PAPER = {"depth": {"abs_rel": 0.118}}


def make_table(world: World, encoder: str) -> Table:
    return Table(
        title="A table",
        rows=(
            Row(name=SINGLE, trainings=(world.training("depth", timesteps=CLEAREST),), paper={}),
            Row(name=FOUR, trainings=(world.training("depth", holdout=0.25),), paper=PAPER),
            Row(name=DINO, trainings=(world.training("depth", discriminative=(encoder,)),), paper={}),
            Row(name=BROKEN, trainings=(world.training("depth", decoder="nonesuch"),), paper={}),
            Row(name=BOTH, trainings=(world.together("segmentation", "depth"),), paper={}),
        ),
        claims=(Claim(better=FOUR, worse=SINGLE, task="depth", metric="abs_rel", source="Sec. 0"),),
        notes=("something to know",),
    )


def carry_out(plan: TablePlan, bar: Bar) -> tuple[TableResult, str]:
    said: list[str] = []
    return run_table(plan, say=said.append, bar=bar), "\n".join(said)


@pytest.fixture
def world(small: World) -> World:
    return replace(small, encoder="dinov3-vitb16", seeds=(0, 1))


@pytest.fixture
def plan(world: World, data: Path, tmp_path: Path) -> TablePlan:
    return plan_table(make_table(world, "dinov3-vitb16"), world, tmp_path / "out", "a-table")


def test_a_table_is_carried_out_once(plan: TablePlan, bar: Bar, tmp_path: Path) -> None:
    result, said = carry_out(plan, bar)
    assert "6 runs: 0 finished" in said
    four = result.find(FOUR, "depth")
    assert four is not None
    assert (set(four.runs), four.scores["abs_rel"].seeds, four.split) == ({0, 1}, 2, "final")
    for seed, folder in four.runs.items():
        config = json.loads((folder / "config.json").read_text())
        assert (config["seed"], config["order_seed"]) == (seed, 0)
    mean = sum(evaluate(folder, "final").scores["abs_rel"] for folder in four.runs.values()) / 2
    assert four.scores["abs_rel"].mean == pytest.approx(mean, rel=1e-12)

    both = [result.find(BOTH, task) for task in ("segmentation", "depth")]
    assert all(one is not None and one.scores for one in both)
    dino, broken = result.find(DINO, "depth"), result.find(BROKEN, "depth")
    assert dino is not None
    assert not dino.scores
    assert str(dino.reason).startswith("the weights of dinov3-vitb16 are not on this machine")
    assert broken is not None
    assert "decoder must be one of" in str(broken.reason)

    weights = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob(f"trainings/*/{LAST}")}
    tables = {file.name: file.read_bytes() for file in result.path.iterdir()}
    assert set(tables) == {"table.md", "table.csv", "results.json", "plot.png", "curves.png"}
    again, said = carry_out(plan_table(plan.table, plan.world, tmp_path / "out", "a-table"), bar)
    assert "6 runs: 6 finished" in said
    assert weights == {
        file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob(f"trainings/*/{LAST}")
    }
    assert again.outcomes == result.outcomes
    assert {file.name: file.read_bytes() for file in result.path.iterdir()} == tables


def test_the_files_say_the_same(plan: TablePlan, bar: Bar) -> None:
    result, _ = carry_out(plan, bar)
    text = (result.path / "table.md").read_text()
    four = result.find(FOUR, "depth")
    assert four is not None
    shown = four.scores["abs_rel"]
    assert f"| {FOUR} | 2 | {shown} (0.118) |" in text
    checks = [read_metrics(folder)[-1]["held_out"]["ema"]["abs_rel"] for folder in four.runs.values()]
    assert four.curve[-1] == (2, pytest.approx(sum(checks) / 2))
    assert four.parameters == sum(value.numel() for value in model_for_run(four.runs[0]).parameters())
    last, change = four.curve[-1][1], four.curve[-1][1] - four.curve[0][1]
    assert f"{four.parameters:,} | {last:.4f} ({change:+.4f}) |" in text
    assert f"| {DINO} | not run | - |" in text
    assert "- something to know" in text
    assert f"- {BROKEN} (depth): decoder must be one of" in text
    rows = list(csv.DictReader((result.path / "table.csv").read_text().splitlines()))
    (line,) = (row for row in rows if (row["row"], row["metric"]) == (FOUR, "abs_rel"))
    assert (float(line["mean"]), line["seeds"], line["paper"]) == (shown.mean, "2", "0.118")
    values = json.loads((result.path / "results.json").read_text())
    assert len(values["outcomes"]) == 6
    (judgement,) = result.judgements
    estimate = judgement.differences[1].estimate
    pair = [result.find(name, "depth") for name in (SINGLE, FOUR)]
    errors = [json.loads((one.runs[1] / SCORES).read_text())["scores"]["abs_rel"] for one in pair if one]
    assert estimate == pytest.approx(errors[0] - errors[1]), "less error is a gain"
    assert f"| {FOUR} > {SINGLE} (Sec. 0) | depth abs_rel ↓ | - | {judgement.differences[0]}<br>" in text
    assert values["claims"][0]["differences"]["1"]["estimate"] == estimate


def test_a_part_has_a_folder_of_its_own_and_shares_the_trainings(plan: TablePlan, bar: Bar) -> None:
    result, _ = carry_out(plan, bar)
    out = result.path.parent
    part = plan_table(plan.table, plan.world, out, "a-table", rows=["four"], tasks=["depth"])
    found, said = carry_out(part, bar)
    assert found.path == out / "a-table-four-depth"
    assert [one.row for one in found.outcomes] == [FOUR]
    assert "2 runs: 2 finished" in said
    with pytest.raises(ConfigError, match="task 'material' is not in this table; it has segmentation, depth"):
        plan_table(plan.table, plan.world, out, "a-table", tasks=["material"])


def test_rows_that_spell_one_training_differently_share_it(
    small: World, data: Path, bar: Bar, tmp_path: Path
) -> None:
    rows = (
        Row(name="by default", trainings=(small.training("depth"),), paper={}),
        Row(name="by name", trainings=(small.training("depth", concepts="depth"),), paper={}),
    )
    plan = plan_table(Table(title="t", rows=rows, claims=()), small, tmp_path / "out", "t")
    result, said = carry_out(plan, bar)
    assert "1 runs: 0 finished, 0 to go on, 1 new" in said
    assert result.outcomes[0].runs == result.outcomes[1].runs


def test_a_training_on_other_samples_is_not_taken_for_this_one(
    small: World, data: Path, bar: Bar, tmp_path: Path
) -> None:
    def planned(world: World) -> TablePlan:
        rows = (Row(name="four", trainings=(world.training("depth"),), paper={}),)
        return plan_table(Table(title="t", rows=rows, claims=()), world, tmp_path / "out", "t")

    first = planned(small)
    carry_out(first, bar)
    (store,) = (one.path for one in first.stores)
    store.rename(store.with_name("elsewhere"))
    result, _ = carry_out(planned(replace(small, limit=3)), bar)
    assert "was trained on a store whose sha256_of_ids is" in str(result.outcomes[0].reason)


def test_a_store_that_cannot_be_made_costs_its_rows_alone(
    small: World, data: Path, bar: Bar, tmp_path: Path
) -> None:
    rows = (
        Row(
            name="double",
            trainings=(small.training("depth", layers=small.double_layers, timesteps=CLEAREST),),
            paper={},
        ),
        Row(name="single", trainings=(small.training("depth"),), paper={}),
    )
    plan = plan_table(Table(title="t", rows=rows, claims=()), small, tmp_path / "out", "t")
    assert len(plan.stores) == 2
    small_one = min(plan.stores, key=lambda one: one.need.maps)
    small_one.path.mkdir(parents=True)
    (small_one.path / "letter.txt").write_text("not a store")
    result, _ = carry_out(plan, bar)
    double, single = result.find("double", "depth"), result.find("single", "depth")
    assert double is not None
    assert str(small_one.path) in str(double.reason)
    assert single is not None
    assert single.scores


def test_the_plan_tells_disk_hours_and_what_is_missing(plan: TablePlan) -> None:
    text = str(plan.timed())
    assert "8 of 8 samples to extract" in text
    assert "of one GPU at 400 TFLOP/s" in text
    assert f"not run    {DINO} (depth): the weights of dinov3-vitb16 are not on this machine" in text
    assert not plan.out.exists()


def test_mean_iou_on_scenes_is_that_of_the_shapes() -> None:
    assert score_name("miou", "segmentation", "scenes") == "miou_shapes"
    assert score_name("miou", "segmentation", "voc") == "miou"
    assert score_name("rmse", "depth", "scenes") == "rmse"


@pytest.mark.slow
def test_worker_processes_change_no_score(plan: TablePlan, tmp_path: Path, bar: Bar) -> None:
    """On a CPU each has its share of the threads, so those of one process are the same here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = run_table(plan, say=lambda _: None, bar=bar, workers=2)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        apart = plan_table(plan.table, plan.world, tmp_path / "alone", "a-table")
        alone = run_table(apart, say=lambda _: None, bar=bar)
    finally:
        torch.set_num_threads(threads)
    assert [one.scores for one in together.outcomes] == [one.scores for one in alone.outcomes]
    assert [one.curve for one in together.outcomes] == [one.curve for one in alone.outcomes]
