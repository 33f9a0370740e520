"""Carries out a table: extract what is not there, train and score what is not, write what came of it.

Nothing is done twice: stores and trainings are those of `extract` and `sweep`, which go on where they were.
"""

import json
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.errors import (
    BackboneError,
    CheckpointError,
    ConfigError,
    DataError,
    MMDiffError,
    StorageRefused,
    StoreError,
)
from mmdiff_cache.experiments.curves import held_out_curve
from mmdiff_cache.experiments.judgement import judge
from mmdiff_cache.experiments.needs import Need, store_for
from mmdiff_cache.experiments.outcome import Outcome, score_name, spreads, test_scores
from mmdiff_cache.experiments.plan import PlannedStore, PlannedTraining, TablePlan, refuse
from mmdiff_cache.experiments.report import write_report
from mmdiff_cache.experiments.result import TableResult
from mmdiff_cache.experiments.stores import in_one_line
from mmdiff_cache.experiments.table import METRICS
from mmdiff_cache.extraction.placement import visible_gpus
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.records import Progress
from mmdiff_cache.sweeps.differences import digest
from mmdiff_cache.sweeps.plan import PlannedRun, plan_sweep
from mmdiff_cache.sweeps.results import count_parameters
from mmdiff_cache.sweeps.run import sweep
from mmdiff_cache.training.build import Part, check_identity
from mmdiff_cache.training.checkpoint import LAST
from mmdiff_cache.training.evaluate import SPLITS, evaluate
from mmdiff_cache.training.resolve import resolve
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

    planned: PlannedTraining
    seed: int
    config: TrainConfig
    """With its stores."""


def run_table(
    plan: TablePlan,
    *,
    say: Say,
    bar: Bar,
    memory: int | None = None,
    workers: int | None = None,
    command: str = "",
) -> TableResult:
    """Do all that is planned and not done yet, and write the table into its folder.

    A store that cannot be made, or a training that fails, costs its rows alone. `memory` bounds the trainings
    that go side by side, as in `sweep`, and `workers` are as there and in `extract`; `command` is the line
    that the results name for it. Raises StorageError for a disk that fails under way, ClusterError for a
    cluster that is lost.
    """
    with _divided_threads(workers):
        return _run_table(plan, say=say, bar=bar, memory=memory, workers=workers, command=command)


@contextmanager
def _divided_threads(workers: int | None) -> Generator[None]:
    """On a CPU each worker has its share of the threads: two that want all cores wait for each other."""
    before = torch.get_num_threads()
    if workers and not visible_gpus("auto"):
        torch.set_num_threads(max(1, before // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_table(
    plan: TablePlan, *, say: Say, bar: Bar, memory: int | None, workers: int | None, command: str
) -> TableResult:
    stores, refused = _extract_all(plan.stores, say, bar, workers)
    trainings = [refuse(one, refused) for one in plan.trainings]
    asked = [one for training in trainings for one in _asked(training, stores, plan.world.seeds)]
    runs = _Runs([one.config for one in asked], plan.folder, memory)
    if asked:
        say(f"\n{runs}")
        with bar("train") as progress:
            runs.train(progress, workers)
    outcomes = tuple(
        replace(outcome, expected=planned.reason is None)
        for planned, one in zip(plan.trainings, trainings, strict=True)
        for outcome in _outcomes(one, plan.tasks, asked, runs)
    )
    claims = [claim for claim in plan.table.claims if claim.task in plan.tasks]
    result = TableResult(
        path=plan.out,
        command=command,
        whole=plan.whole,
        world=plan.world.name,
        table=plan.table,
        tasks=plan.tasks,
        outcomes=outcomes,
        judgements=tuple(judge(claim, outcomes) for claim in claims),
    )
    write_report(result)
    return result


def _extract_all(
    stores: Sequence[PlannedStore], say: Say, bar: Bar, workers: int | None
) -> tuple[dict[Need, Path], dict[Need, str]]:
    """The folder of every store that could be made, and why the others could not."""
    made: dict[Need, Path] = {}
    refused: dict[Need, str] = {}
    for one in stores:
        if one.extraction is None:
            made[one.need] = one.path
            continue
        try:
            if one.extraction.done < one.extraction.total:
                say(f"\n{one.extraction}")
            with bar("extract") as progress:
                store = extract(one.extraction, progress, workers=workers)
        except REFUSALS as error:
            refused[one.need] = in_one_line(error)
            continue
        made[one.need] = store.path
        if failed := store.samples_failed:
            logger.warning("%d samples failed; 'mmdiff-cache inspect %s' says why", failed, store.path)
    return made, refused


def _asked(one: PlannedTraining, stores: Mapping[Need, Path], seeds: Sequence[int]) -> list[Asked]:
    """A training that nothing is missing for, once a seed."""
    if one.reason is not None:
        return []
    folders = tuple(str(store_for(need, stores)) for need in one.needs)
    if one.training.config.disjoint:
        folders = folders[:1]
    return [
        Asked(
            planned=one,
            seed=seed,
            config=replace(one.training.config, stores=folders, seed=seed, order_seed=ORDER_SEED),
        )
        for seed in seeds
    ]


class _Runs:
    """The sweep over all trainings, and what it made of each."""

    def __init__(self, configs: Sequence[TrainConfig], folder: Path, memory: int | None) -> None:
        self._refused: dict[str, str] = {}
        self._codes: dict[str, str] = {}
        once: dict[str, TrainConfig] = {}  # two rows may spell the same training differently
        for config in configs:
            try:
                self._codes[_key(config)] = digest(resolve(config))
            except MMDiffError as error:
                self._refused[_key(config)] = in_one_line(error)
            else:
                once.setdefault(self._codes[_key(config)], config)
        self._plan = plan_sweep(list(once.values()), folder, memory_bytes=memory) if once else None
        self._failed: Mapping[str, str] = {}
        refused = {} if self._plan is None else self._plan.refused  # by '3. depth', counted from 1
        for name, reason in refused.items():
            self._refused[list(once)[int(name.partition(".")[0]) - 1]] = reason

    def __str__(self) -> str:
        return str(self._plan)

    def train(self, progress: Progress, workers: int | None) -> None:
        """Train and score what is not yet."""
        if self._plan is None:
            return
        self._failed = sweep(self._plan, progress=progress, workers=workers).failed
        for run in self._plan.runs:
            if run.name not in self._failed and run.test_split is None:
                self._score_apart(run, progress)

    def _score_apart(self, run: PlannedRun, progress: Progress) -> None:
        """Score a run of several tasks whose data sets share no split, as VOC (val) and DUTS (test)."""
        for part in run.setup.parts:
            split = split_of(part)
            if split is not None and test_scores(run.folder, part.task.name, split) is None:
                evaluate(run.folder, split, task=part.task.name, progress=progress)

    def find(self, config: TrainConfig) -> PlannedRun | str:
        """The finished training, or why there is none."""
        code = self._codes.get(_key(config), _key(config))
        if code in self._refused:
            return self._refused[code]
        assert self._plan is not None
        run = next(run for run in self._plan.runs if digest(run.config) == code)
        if run.name in self._failed:
            return self._failed[run.name]
        try:
            # a finished training is not looked at again, and its store may have become another
            check_identity(run.setup, load_run(run.folder).origin, run.folder / LAST)
        except CheckpointError as error:
            return in_one_line(error)
        return run


def split_of(part: Part) -> str | None:
    """The split that a task is scored on, as `evaluate` chooses it; None where its store has none."""
    return next((split for split in SPLITS if split in part.store.splits), None)


def _key(config: TrainConfig) -> str:
    return json.dumps(config.to_json(), sort_keys=True)


def _outcomes(
    one: PlannedTraining, tasks: Sequence[str], asked: Sequence[Asked], runs: _Runs
) -> list[Outcome]:
    """What came of a training, for each of its tasks that were asked for."""
    found = {other.seed: runs.find(other.config) for other in asked if other.planned is one}
    done = {seed: run for seed, run in found.items() if isinstance(run, PlannedRun)}
    reasons = [reason for reason in found.values() if isinstance(reason, str)]
    return [
        _outcome(one, number, done, one.reason or next(iter(reasons), None))
        for number, task in enumerate(one.training.tasks)
        if task in tasks
    ]


def _outcome(
    one: PlannedTraining, number: int, done: Mapping[int, PlannedRun], reason: str | None
) -> Outcome:
    """What came of the task of this number."""
    task, dataset = one.training.tasks[number], one.training.datasets[number]
    splits = {seed: split_of(run.setup.parts[number]) for seed, run in done.items()}
    split = next(iter(splits.values()), None)
    scores = {
        seed: found
        for seed, run in done.items()
        if split is not None and (found := test_scores(run.folder, task, split)) is not None
    }
    if len(scores) < len(done):
        reason = reason or f"trained, but not scored on {split or 'any split'}; run it again"
    return Outcome(
        row=one.row.name,
        task=task,
        dataset=dataset,
        split=split,
        paper=one.row.paper.get(task, {}),
        runs={seed: done[seed].folder for seed in scores},
        scores=spreads(list(scores.values()), task, dataset),
        parameters=max((count_parameters(done[seed].folder) for seed in scores), default=None),
        curve=held_out_curve(
            (done[seed].folder for seed in scores), task, score_name(METRICS[task][0], task, dataset)
        ),
        expected=one.reason is None,
        reason=reason,
    )
