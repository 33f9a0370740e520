"""The tables as recipes: each says the numbers of the paper, and each runs from the data to the figures."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from mmdiff_cache.cli.app import run
from mmdiff_cache.experiments.needs import needs_of
from mmdiff_cache.experiments.table import METRICS, Table
from mmdiff_cache.experiments.world import make_world
from pipelines import (
    table_04,
    table_05,
    table_10,
    table_14,
    table_controls,
    table_growth,
    table_readings,
    table_timesteps,
    tables_11_13,
)
from tests.datasets import trees
from tests.tiny_sd3 import save_tiny_sd3

RECIPES = (table_04, table_05, table_10, tables_11_13, table_14)
OURS = (table_controls, table_growth, table_readings, table_timesteps)
"""Tables that the paper lacks."""
WORLDS = {"paper": make_world(), "small": make_world(datasets=["scenes"])}
DATA = ("voc", "duts", "nyu", "nyu_1449")
SMALL = ("aggregator.width=8", "aggregator.depth=1", "aggregator.heads=2")


def name(recipe: object) -> str:
    return getattr(recipe, "__name__", str(recipe)).rpartition(".")[2]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_every_row_can_be_read_from_a_store_and_has_the_papers_figures(
    recipe: ModuleType, world: str
) -> None:
    table: Table = recipe.table(WORLDS[world])
    assert table.tasks == tuple(METRICS)
    for row in table.rows:
        for training in row.trainings:
            assert len(needs_of(training, WORLDS[world])) == len(training.tasks)
        for task, figures in row.paper.items():
            assert row.training(task) is not None or not figures
            assert set(figures) <= set(METRICS[task])
    told = [row for row in table.rows if any(row.paper.values())]
    assert len(told) > len(table.rows) / 3


@pytest.mark.parametrize("recipe", OURS, ids=name)
def test_rows_of_our_own_say_all_that_they_read(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Layers and timesteps are not left to what a store happens to hold, and no task goes without a claim."""
    monkeypatch.setenv("MMDIFF_DATA", str(tmp_path))
    table: Table = recipe.table(WORLDS["small"])
    assert table.tasks == (("depth",) if recipe is table_readings else tuple(METRICS))
    assert {claim.task for claim in table.claims} == set(table.tasks)
    for row in table.rows:
        assert not row.paper
        for training in row.trainings:
            assert training.config.layers
            assert training.config.timesteps
            assert training.config.variants


def test_readings_change_what_their_rows_name() -> None:
    rows = {row.name: row for row in table_readings.table(WORLDS["small"]).rows}
    default = rows.pop(table_readings.DEFAULT).training("depth")
    assert default is not None
    for row in rows.values():
        training = row.training("depth")
        assert training is not None
        fields = zip(default.config.to_json().items(), training.config.to_json().items(), strict=True)
        assert sum(one != other for one, other in fields) == 1, row.name


@pytest.mark.parametrize("recipe", [*RECIPES, *OURS], ids=name)
def test_a_recipe_is_short_and_says_how_it_is_run(recipe: ModuleType) -> None:
    text = Path(str(recipe.__file__)).read_text()
    assert 40 <= len(text.splitlines()) <= 125
    assert f"mmdiff-cache table pipelines/{name(recipe)}.py --dataset scenes" in text
    assert "class " not in text
    assert "torch" not in text


def test_the_ablation_changes_what_its_rows_name_and_no_more() -> None:
    rows = {row.name: row for row in table_05.table(WORLDS["small"]).rows}

    def differing(one: str, other: str) -> set[str]:
        pair = [rows[row].training("depth") for row in (one, other)]
        values = [training.config.to_json() for training in pair if training is not None]
        return {field for field in values[0] if values[0][field] != values[1][field]}

    assert differing(table_05.SINGLE, table_05.DOUBLE) == {"layers"}
    assert differing(table_05.CONCEPTS, table_05.SINGLE) == {"concepts"}
    assert differing(table_05.CONCEPTS, table_05.CROSS) == {"concepts"}
    assert differing(table_05.FOUR, table_05.CONCEPTS) == {"timesteps"}
    assert differing(table_05.FULL, table_05.FOUR) == {"discriminative"}
    assert differing(table_05.FULL, table_05.NO_AGGREGATION) == {"aggregator"}


def test_every_task_of_a_unified_row_has_as_many_pictures_as_alone() -> None:
    each = WORLDS["small"].share(3)
    assert each is not None
    for row in table_10.table(WORLDS["small"]).rows:
        for training in row.trainings:
            assert training.config.limit == each * len(training.tasks)
            assert training.config.disjoint == (len(training.tasks) > 1)
    for row in table_10.table(WORLDS["paper"]).rows:
        assert all(one.config.limit is None and not one.config.disjoint for one in row.trainings)


def test_the_sets_of_concepts_stand_in_the_text_of_their_rows() -> None:
    names = [row.name for row in tables_11_13.table(WORLDS["small"]).rows]
    assert "depth: depth, surface, object, near, far" in names
    assert any("ball" in name for name in names)
    assert not any("ball" in row.name for row in tables_11_13.table(WORLDS["paper"]).rows)
    assert {one.datasets for row in tables_11_13.table(WORLDS["paper"]).rows for one in row.trainings} == {
        ("voc",),
        ("duts",),
        ("nyu_1449",),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four data sets in their own formats, NYU in its size for the sake of its crop; and a tiny SD3.5."""
    root = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "ROWS", 480)
        patch.setattr(trees, "COLUMNS", 640)
        for dataset in DATA:
            (root / dataset).mkdir()
            trees.TREES[dataset](root / dataset)
    save_tiny_sd3(root / "tiny-sd3")
    return root


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_the_full_size_recipe_runs_on_a_small_tree(
    recipe: ModuleType,
    data: Path,
    tiny_flux_folder: Path,
    tiny_dinov3_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The paper's data sets as they are distributed, and random models of the classes that the paper has."""
    monkeypatch.setenv("MMDIFF_DATA", str(data / "stores"))
    command = ["table", str(recipe.__file__), "--limit", "4", "--quick", "--out", str(data / "out")]
    command += ["--backbone", str(tiny_flux_folder), "--backbone", str(data / "tiny-sd3")]
    command += ["--encoder", str(tiny_dinov3_folder)]
    command += [word for dataset in DATA for word in ("--data-root", f"{dataset}={data / dataset}")]
    command += [word for field in SMALL for word in ("--set", field)]
    assert run(command) == 0
    printed = capsys.readouterr()
    assert "not run" not in printed.out + printed.err
    folder = data / "out" / name(recipe).replace("_", "-")
    outcomes = json.loads((folder / "results.json").read_text())["outcomes"]
    assert len(outcomes) == sum(
        len(training.tasks) for row in recipe.table(WORLDS["paper"]).rows for training in row.trainings
    )
    for outcome in outcomes:
        assert outcome["reason"] is None
        assert outcome["split"] == ("val" if outcome["dataset"] == "voc" else "test")
        assert set(outcome["scores"]) == set(METRICS[outcome["task"]])
    stores = {path.parent: path.stat().st_mtime_ns for path in (data / "stores").glob("*/*/manifest.json")}
    assert run(command) == 0
    assert re.search(r"(\d+) runs: \1 finished", capsys.readouterr().out)
    assert stores == {
        path.parent: path.stat().st_mtime_ns for path in (data / "stores").glob("*/*/manifest.json")
    }
