"""The table of controls: rows differ in what they test alone, and its smallest run ends with verdicts."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path

import pytest

from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.config import TrainConfig
from mmdiff_cache.experiments import World
from mmdiff_cache.experiments.plan import plan_table
from mmdiff_cache.experiments.result import TableResult
from mmdiff_cache.experiments.run import run_table
from mmdiff_cache.experiments.world import make_world
from mmdiff_cache.records import Progress
from mmdiff_cache.sweeps.results import read_result
from pipelines import table_controls as recipe

DIFFERS = {
    (recipe.WITHOUT, recipe.SINGLE): {"timesteps"},
    (recipe.WITHOUT, recipe.DRAWS): {"timesteps", "variants", "variant_use"},
    (recipe.WITHOUT, recipe.REPEATED): {"timesteps"},
    (recipe.WITHOUT, recipe.EQUAL): {"aggregator"},
    (recipe.DRAWS, recipe.SINGLE): {"variants", "variant_use"},
    (recipe.REPEATED, recipe.SINGLE): {"timesteps"},
    (recipe.SINGLE, recipe.LATENT): {"source", "timesteps"},
    (recipe.WITHOUT, recipe.MEAN): {"aggregator"},
    (recipe.WITHOUT, recipe.CONCAT): {"aggregator"},
    (recipe.WITH, recipe.WITHOUT): {"concepts"},
    (recipe.WITH, recipe.SHUFFLED): {"concept_maps"},
    (recipe.WITH, recipe.UNTRAINED): {"concepts"},
    (recipe.WITH, recipe.CROSS): {"concepts"},
    (recipe.WITHOUT, recipe.RANDOM): set(),
    (recipe.WITHOUT, recipe.LATENT): {"source"},
    (recipe.WITHOUT, recipe.PIXELS): {"source", "learning_rate"},
}


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMDIFF_DATA", str(tmp_path / "data"))


def small(folder: Path) -> World:
    return make_world(datasets=("scenes",), backbones=(str(folder),), quick=True, limit=4, seeds=(0, 1))


def test_each_claim_compares_rows_that_differ_in_what_it_is_about(tiny_flux_folder: Path) -> None:
    found = recipe.table(small(tiny_flux_folder))
    rows = {row.name: row for row in found.rows}
    assert {(claim.better, claim.worse) for claim in found.claims} == set(DIFFERS)
    for (better, worse), task in product(DIFFERS, found.tasks):
        pair = [rows[name].training(task) for name in (better, worse)]
        one, other = (training for training in pair if training is not None)
        differs = {
            field.name
            for field in dataclasses.fields(TrainConfig)
            if getattr(one.config, field.name) != getattr(other.config, field.name)
        }
        assert differs == DIFFERS[better, worse]
        assert (one.backbone != other.backbone) == (worse == recipe.RANDOM)


def test_nothing_is_left_to_what_a_store_happens_to_hold(tiny_flux_folder: Path) -> None:
    """And only the row of draws reads several."""
    for row in recipe.table(small(tiny_flux_folder)).rows:
        for training in row.trainings:
            assert training.config.layers == describe(str(tiny_flux_folder)).layers[1:3]
            assert training.config.timesteps is not None
            draws = (0, 1, 2, 3) if row.name == recipe.DRAWS else (0,)
            assert training.config.variants == draws


def test_at_full_size_it_can_be_planned(tmp_path: Path) -> None:
    world = make_world()
    plan = plan_table(recipe.table(world), world, tmp_path, "controls")
    assert "flux-dev" in str(plan)
    assert len(plan.table.rows) == 14


def quiet(_: str) -> AbstractContextManager[Progress]:
    return nullcontext(lambda done, total, state: None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_smallest_run_gives_every_claim_a_verdict(tiny_flux_folder: Path, tmp_path: Path) -> None:
    world = small(tiny_flux_folder)
    plan = plan_table(recipe.table(world), world, tmp_path / "out", "controls", tasks=("depth",))
    result = run_table(plan, say=lambda _: None, bar=quiet)
    assert not result.failed
    parameters = {
        row: read_result(outcome_runs(result, row)[0]).parameters
        for row in (recipe.WITHOUT, recipe.DRAWS, recipe.REPEATED)
    }
    assert len(set(parameters.values())) == 1
    asked = [claim for claim in plan.table.claims if claim.task == "depth"]
    assert [one.claim for one in result.judgements] == asked
    for one in result.judgements:
        assert len(one.differences) == 2
        assert (one.verdict, one.reason) == ("open", "a verdict takes 3 seeds, there are 2")


def outcome_runs(result: TableResult, row: str) -> list[Path]:
    outcome = result.find(row, "depth")
    assert outcome is not None
    return list(outcome.runs.values())
