"""Carries out a table: extract what is not there, train and score what is not, write what came of it.

Nothing is done twice: stores and trainings are those of `extract` and `sweep`, which go on where they were.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.errors import (
    BackboneError,
    CheckpointError,
    ConfigError,
    DataError,
    StorageRefused,
    StoreError,
)
from mmdiff_cache.experiments.outcome import Outcome, TableResult, scores_of
from mmdiff_cache.experiments.plan import PlannedStore, TablePlan, wanted
from mmdiff_cache.experiments.report import write_report
from mmdiff_cache.experiments.stores import Need, needs_of, store_for
from mmdiff_cache.experiments.table import Row, Training
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.records import Progress
from mmdiff_cache.sweeps.plan import PlannedRun, SweepPlan, plan_sweep
from mmdiff_cache.sweeps.results import RunResult, read_result
from mmdiff_cache.sweeps.run import sweep
from mmdiff_cache.training.build import check_identity
from mmdiff_cache.training.checkpoint import LAST
from mmdiff_cache.training.run import load_run

logger = logging.getLogger(__name__)

REFUSALS = (BackboneError, ConfigError, DataError, StoreError, StorageRefused)
"""What one store cannot be made for; the rows on other stores go on."""
ORDER_SEED = 0
"""Of all trainings, so that they share their readings (docs/sweeps.md)."""

Say = Callable[[str], None]
Bar = Callable[[str], AbstractContextManager[Progress]]
"""Opens a progress display for one stage of the work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One training of a row, for one seed."""

    row: Row
    training: Training
    seed: int
    config: TrainConfig
    """With its stores."""


def run_table(plan: TablePlan, *, say: Say, bar: Bar, memory: int | None = None) -> TableResult:
    """Do all that is planned and not done yet, and write the table into its folder.

    A store that cannot be made, or a training that fails, costs its rows alone. `memory` bounds the trainings
    that go side by side, as in `sweep`. Raises ConfigError for a plan of which nothing can be run,
    StorageError for a disk that fails under way, ClusterError for a cluster that is lost.
    """
    stores, refused = _extract_all(plan.stores, say, bar)
    reasons = {**plan.not_run, **_refused_rows(plan, refused)}
    asked = [one for one in _asked(plan, stores) if (one.row.name, one.training.tasks[0]) not in reasons]
    planned = (
        plan_sweep([one.config for one in asked], plan.trainings, memory_bytes=memory) if asked else None
    )
    failed: Mapping[str, str] = {}
    if planned is not None:
        say(f"\n{planned}")
        with bar("train") as progress:
            failed = sweep(planned, progress=progress).failed
    outcomes = _outcomes(plan, asked, _Runs(asked, planned, failed), reasons)
    result = TableResult(
        path=plan.out, world=plan.world.name, table=plan.table, tasks=plan.tasks, outcomes=outcomes
    )
    write_report(result)
    return result


def _extract_all(
    stores: Sequence[PlannedStore], say: Say, bar: Bar
) -> tuple[dict[Need, Path], dict[Need, str]]:
    """The folder of every store that could be made, and why the others could not."""
    made: dict[Need, Path] = {}
    refused: dict[Need, str] = {}
    for one in stores:
        say(f"\n{one.extraction}")
        try:
            with bar("extract") as progress:
                store = extract(one.extraction, progress)
        except REFUSALS as error:
            refused[one.need] = str(error).splitlines()[0]
            continue
        made[one.need] = store.path
        if store.samples_failed:
            logger.warning(
                "%d samples of %s failed; 'mmdiff-cache inspect %s' says why",
                store.samples_failed,
                store.path,
                store.path,
            )
    return made, refused


def _refused_rows(plan: TablePlan, refused: Mapping[Need, str]) -> dict[tuple[str, str], str]:
    """The rows whose stores could not be made."""
    return {
        (row.name, task): why
        for row, training in plan.rows
        for need in needs_of(training, plan.world)
        for whole, why in refused.items()
        if whole.holds(need)
        for task in training.tasks
    }


def _asked(plan: TablePlan, stores: Mapping[Need, Path]) -> list[Asked]:
    """Every training whose stores are there, once a seed."""
    found: list[Asked] = []
    for row, training in plan.rows:
        folders = [store_for(need, stores) for need in needs_of(training, plan.world)]
        known = [str(folder) for folder in folders if folder is not None]
        if len(known) < len(folders):
            continue
        for seed in plan.world.seeds:
            config = replace(
                training.config,
                stores=tuple(dict.fromkeys(known)) if training.config.disjoint else tuple(known),
                seed=seed,
                order_seed=ORDER_SEED,
            )
            found.append(Asked(row=row, training=training, seed=seed, config=config))
    return found


class _Runs:
    """What the sweep made of each training that it was asked for."""

    def __init__(self, asked: Sequence[Asked], plan: SweepPlan | None, failed: Mapping[str, str]) -> None:
        self._failed = failed
        self._planned = {} if plan is None else {_key(run.asked): run for run in plan.runs}
        refused = {} if plan is None else plan.refused
        numbers = {int(name.partition(".")[0]): why for name, why in refused.items()}
        self._refused = {_key(asked[number - 1].config): why for number, why in numbers.items()}

    def result(self, config: TrainConfig) -> RunResult | str:
        """The finished training with its scores, or why there is none."""
        run = self._planned.get(_key(config))
        if run is None:
            return self._refused[_key(config)]
        if run.name in self._failed:
            return self._failed[run.name]
        try:
            _check_same(run)
            found = read_result(run.folder)
        except CheckpointError as error:
            return str(error).splitlines()[0]
        return found if found.finished and found.test else f"{run.folder} has no test scores; run it again"


def _check_same(run: PlannedRun) -> None:
    """Raise CheckpointError for a training on samples that its store no longer has."""
    check_identity(run.setup, load_run(run.folder).origin, run.folder / LAST)


def _key(config: TrainConfig) -> str:
    return json.dumps(config.to_json(), sort_keys=True)


def _outcomes(
    plan: TablePlan, asked: Sequence[Asked], runs: _Runs, reasons: Mapping[tuple[str, str], str]
) -> tuple[Outcome, ...]:
    found: list[Outcome] = []
    for row in plan.table.rows:
        for training in wanted(row, plan.tasks):
            own = [one for one in asked if one.row is row and one.training is training]
            results = {one.seed: runs.result(one.config) for one in own}
            why = next((text for text in results.values() if isinstance(text, str)), None)
            why = reasons.get((row.name, training.tasks[0]), why)
            done = {seed: one for seed, one in results.items() if isinstance(one, RunResult)}
            for task, dataset in zip(training.tasks, training.datasets, strict=True):
                if task in plan.tasks:
                    found.append(
                        Outcome(
                            row=row.name,
                            task=task,
                            dataset=dataset,
                            paper=row.paper.get(task, {}),
                            runs={seed: one.path for seed, one in done.items()},
                            scores=scores_of(list(done.values()), task, dataset),
                            reason=why,
                        )
                    )
    return tuple(found)
