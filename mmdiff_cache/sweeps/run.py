"""Carries out a sweep: part by part in this process, or handed to the workers of a dask cluster.

result = sweep([TrainConfig(task="depth", seed=n, order_seed=0) for n in range(3)], "runs/seeds")
print(result.table)
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmdiff_cache.config import ExtractConfig, TrainConfig
from mmdiff_cache.errors import CheckpointError, StorageRefused
from mmdiff_cache.extraction.placement import open_cluster
from mmdiff_cache.records import Progress
from mmdiff_cache.sweeps.compare import RECORD
from mmdiff_cache.sweeps.part import Job, run_part
from mmdiff_cache.sweeps.plan import PlannedRun, SweepPlan, plan_sweep
from mmdiff_cache.sweeps.plot import draw_table
from mmdiff_cache.sweeps.results import HELD_OUT, RunResult, read_result
from mmdiff_cache.sweeps.table import Table, tabulate
from mmdiff_cache.training import checkpoint

logger = logging.getLogger(__name__)

CSV, MARKDOWN, PLOT = "table.csv", "table.md", "plot.png"
OPTION = "--out"
"""What chooses the sweep's folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """What came of a sweep."""

    path: Path
    table: Table
    failed: dict[str, str]
    """Runs that failed, and configurations that could not be trained, each with its reason."""


def sweep(
    configs: Sequence[TrainConfig] | SweepPlan,
    out: str | Path = "runs/sweep",
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    memory: int | None = None,
    evaluate: bool = True,
    progress: Progress | None = None,
) -> SweepResult:
    """Train all configurations into `out`, one folder each, sharing what they read; safe to run again.

    Every run ends with the checkpoint that it would have alone. `workers` and `scheduler` are as those of
    `extract`; by default there is a worker for each visible GPU if there are several. `memory` bounds the
    bytes of the trainings that go side by side. `evaluate` scores the split that `evaluate` takes, in one
    pass. A run that fails stops no other. Raises ConfigError for no configurations, ClusterError for a
    cluster that cannot be had or is lost.
    """
    if isinstance(configs, SweepPlan):
        plan = configs
    else:
        plan = plan_sweep(configs, Path(out), memory_bytes=memory, evaluate=evaluate)
    _make(plan.folder)
    failed = dict(plan.refused)
    _record(plan, failed)
    failed |= _carry_out(plan, workers, scheduler, progress or _silent)
    _record(plan, failed)
    return SweepResult(path=plan.folder, table=_publish(plan), failed=failed)


def _carry_out(
    plan: SweepPlan, workers: int | None, scheduler: str | None, progress: Progress
) -> dict[str, str]:
    """Have all parts done; the reasons of the runs that failed, by name."""
    if not plan.parts:
        return {}
    first = plan.parts[0][0]
    device = first.config.device
    with open_cluster(ExtractConfig(device=device), workers, scheduler) as client:
        if client is None:
            failed = _in_process(plan, progress)
        else:
            from mmdiff_cache.sweeps.workers import on_workers, places

            if scheduler is None and device != "cpu":
                device = "cuda"  # each worker of our own sees one GPU
            elif scheduler is not None:
                device = first.asked.device
            parts = plan.divided(len(places(client, device)))
            failed = on_workers(client, [_job(plan, part, device) for part in parts], progress)
    return {Path(folder).name: reason for folder, reason in failed.items()}


def _job(plan: SweepPlan, part: Sequence[PlannedRun], device: str) -> Job:
    """A part as a process is told of it."""
    return Job(
        configs=tuple(replace(run.config, device=device) for run in part),
        test_split=part[0].test_split if plan.evaluate else None,
    )


def _in_process(plan: SweepPlan, progress: Progress) -> dict[str, str]:
    failed: dict[str, str] = {}
    jobs = [_job(plan, part, part[0].config.device) for part in plan.parts]
    total, before = sum(job.steps for job in jobs), 0
    for number, (job, part) in enumerate(zip(jobs, plan.parts, strict=True), 1):
        advance = _within(progress, before, total, f"reading {number} of {len(jobs)}: ")
        failed |= run_part(job, advance, {run.folder: run.setup for run in part})
        before += job.steps
    return failed


def _within(progress: Progress, before: int, total: int, prefix: str) -> Progress:
    """The progress of one part as that of the whole."""

    def advance(done: int, _: int, state: str) -> None:
        progress(before + done, total, prefix + state)

    return advance


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageRefused(
            f"cannot make the sweep's folder {folder}: {error.strerror or error}; "
            f"choose another with {OPTION}"
        ) from error


def _record(plan: SweepPlan, failed: dict[str, str]) -> None:
    """Write which runs belong to the sweep, in order, and what has failed."""
    values = {"runs": [run.name for run in plan.runs], "failed": failed}
    checkpoint.write_json(plan.folder / RECORD, values, OPTION)


def _publish(plan: SweepPlan) -> Table:
    """The table of what has finished, also as files."""
    results: list[RunResult] = []
    for run in plan.runs:
        try:  # of the sweep alone, whatever else `evaluate` has scored since
            results.append(read_result(run.folder, places=(HELD_OUT, run.test_split)))
        except CheckpointError as error:  # it failed before its first checkpoint
            logger.info("not in the table: %s", error)
    table = tabulate([result for result in results if result.finished], [run.asked for run in plan.runs])
    checkpoint.write_bytes(plan.folder / CSV, table.to_csv().encode(), OPTION)
    checkpoint.write_bytes(plan.folder / MARKDOWN, table.to_markdown().encode(), OPTION)
    if table.rows:
        draw_table(table, plan.folder / PLOT)
    return table


def _silent(done: int, total: int, state: str) -> None:
    """No progress wanted."""
