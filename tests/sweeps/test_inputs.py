"""Whatever runs read and however they learn: those that share a reading end as they would alone."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmdiff_cache.config import ConceptMapsConfig, TrainConfig
from mmdiff_cache.sweeps import sweep
from mmdiff_cache.sweeps.plan import plan_sweep
from mmdiff_cache.sweeps.results import read_result
from mmdiff_cache.sweeps.run import SweepResult
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.run import load_run, train
from tests.learnable import LAYERS, make_rich_schema, write_store
from tests.sweeps.conftest import contents, quick

UNIFIED = "segmentation+depth"
SOFT = ConceptMapsConfig(
    blocks=("double.1",), temperature=2.0, reading="mean_then_softmax", timesteps=(0.78,)
)
GROUPS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "variants drawn": (
        {},
        {"seed": 1, "standardise": True, "drop_channels": (5, 17), "discriminative": ("eyes",)},
        {"concepts": "cross_attention", "layers": (LAYERS[0], LAYERS[2])},
        {"concepts": "depth", "concept_maps": SOFT, "timesteps": (0.78, 0.001), "accumulate": 2},
        {"concept_maps": ConceptMapsConfig(shuffled=True), "timesteps": (0.26, 0.26), "clip": 0.1},
        {"task": "depth", "patience": 1, "checks": 3, "learning_rate": 1e-12},
    ),
    "variants stacked": (
        {"variant_use": "stack"},
        {"variant_use": "stack", "timesteps": (0.78, 0.001), "layers": LAYERS[1:], "decoder": "dpt"},
    ),
    "an encoder alone": (
        {"source": "discriminative", "discriminative": ("eyes",), "layers": ("11",)},
        {"source": "discriminative", "discriminative": ("eyes",), "task": "saliency", "standardise": True},
    ),
    "latents": (
        {"source": "latents", "layers": (LAYERS[2],), "seed": 1},
        {"source": "latents", "task": "depth", "discriminative": ("eyes",)},
    ),
    "several tasks": (
        {"task": UNIFIED},
        {"task": UNIFIED, "seed": 1, "standardise": True, "layers": LAYERS[1:], "loss_weights": (1.0, 2.0)},
        {"task": "depth+saliency", "timesteps": (0.26,), "concepts": "saliency"},
    ),
}


@pytest.fixture(scope="module")
def rich_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training samples in four variants, with attention maps and an encoder."""
    return write_store(tmp_path_factory.mktemp("stores") / "rich", train=12, schema=make_rich_schema())


def configs_of(store: Path, group: str) -> list[TrainConfig]:
    """Six steps see the samples in three epochs, and so in other variants."""
    return [quick(store, steps=6, **changes) for changes in GROUPS[group]]


@pytest.mark.parametrize("group", GROUPS)
def test_each_run_ends_as_it_does_alone(group: str, rich_store: Path, tmp_path: Path) -> None:
    plan = plan_sweep(configs_of(rich_store, group), tmp_path / "sweep")
    assert [len(part) for part in plan.parts] == [len(GROUPS[group])]
    result = sweep(plan)
    assert not result.failed
    for run in plan.runs:
        shared = tmp_path / "shared" / run.name
        shutil.move(run.folder, shared)
        alone = train(replace(run.asked, run=str(run.folder)))
        assert contents(shared) == contents(run.folder), run.name
        assert load_run(shared).scores == alone.scores
        assert read_result(shared).finished
        for task in alone.tasks:
            scores = evaluate(alone, task=task)
            title = scores.headline if len(alone.tasks) == 1 else f"{task} {scores.headline}"
            assert read_result(shared).scores["test"][title] == scores.scores[scores.headline]
        assert read_result(shared).scores == read_result(alone.path).scores
        assert read_result(shared).protocols == read_result(alone.path).protocols


@pytest.fixture(scope="module")
def several(rich_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """Two runs of two tasks each, in one row of the table."""
    configs = [quick(rich_store, task=UNIFIED, seed=seed) for seed in (0, 1)]
    return sweep(configs, tmp_path_factory.mktemp("sweeps") / "several")


def test_a_run_of_several_tasks_is_judged_by_the_headline_of_each(several: SweepResult) -> None:
    (row,) = several.table.rows
    assert dict(row.headlines) == {"segmentation miou": True, "depth abs_rel": False}
    assert row.seeds == 2
    shown = several.table.header()
    assert {"held-out segmentation miou", "test depth abs_rel"} <= set(shown)
    assert (several.path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_each_run_has_its_own_log(several: SweepResult) -> None:
    logs = [path.read_text() for path in several.path.glob("*/train.log")]
    assert len(logs) == 2
    for log in logs:
        assert log.count("training on") == 1
        assert log.count("step 3: held-out miou") == 1


def test_tasks_and_one_of_them_do_not_share(rich_store: Path, tmp_path: Path) -> None:
    plan = plan_sweep([quick(rich_store, task=task) for task in (UNIFIED, "depth")], tmp_path)
    assert [len(part) for part in plan.parts] == [1, 1]
    mixed = [quick(rich_store, task=UNIFIED, mixing=mixing) for mixing in (None, (1.0, 1.0), (2.0, 1.0))]
    assert [len(part) for part in plan_sweep(mixed, tmp_path).parts] == [2, 1]
