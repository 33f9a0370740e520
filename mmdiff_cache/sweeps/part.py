"""Trains runs that share a reading, and scores them on the test split in one pass."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.errors import MMDiffError, StorageError
from mmdiff_cache.records import Progress
from mmdiff_cache.sweeps.results import SCORES, is_scored
from mmdiff_cache.sweeps.shared import lean, read_together, share_of, shared_reading
from mmdiff_cache.tasks import Task
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.build import Part, Setup, open_dataset
from mmdiff_cache.training.checkpoint import EMA, LAST
from mmdiff_cache.training.folder import open_folder
from mmdiff_cache.training.loop import run_loop
from mmdiff_cache.training.protocol import Way
from mmdiff_cache.training.resolve import pick_device
from mmdiff_cache.training.run import flushing_denormals, load_run, model_for_run, opened
from mmdiff_cache.training.scoring import Predictor, Scores, model_predictor, score, seen_through
from mmdiff_cache.training.statistics import PictureStatistics, picture_statistics, write_statistics
from mmdiff_cache.training.trainer import Share, Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Runs that read together: all that a process has to know to train them."""

    configs: tuple[TrainConfig, ...]
    """Resolved, with their folders; the device may be `auto`, that of the process."""
    test_split: str | None
    """What they are scored on afterwards; None for nothing."""

    @property
    def steps(self) -> int:
        """Steps of the longest."""
        return max(filled(config.steps) for config in self.configs)


def run_part(job: Job, progress: Progress, known: Mapping[Path, Setup] | None = None) -> dict[str, str]:
    """Train what is not finished, score what is not scored; the reasons of what failed, by folder.

    Raises nothing that is one run's own affair, and leaves finished runs as they are. `known` are the setups
    of this process, by folder.
    """
    failed: dict[str, str] = {}
    setups, unfinished = _set_up_all(job.configs, known or {}, failed)
    if unfinished:
        failed |= _train({folder: setups[folder] for folder in unfinished}, progress)
    if job.test_split is not None:
        trained = {folder: setup for folder, setup in setups.items() if str(folder) not in failed}
        rest = {folder: setup for folder, setup in trained.items() if not is_scored(load_run(folder))}
        failed |= _score_alike(rest, job.test_split, _after(job.steps, progress))
    return failed


def _after(steps: int, progress: Progress) -> Progress:
    """Progress of what comes when all steps are made."""

    def scoring(done: int, total: int, state: str) -> None:
        progress(steps, steps, f"scoring {done} of {total}")

    return scoring


def _set_up_all(
    configs: Sequence[TrainConfig], known: Mapping[Path, Setup], failed: dict[str, str]
) -> tuple[dict[Path, Setup], list[Path]]:
    """What each needs, and the folders of those that are not finished."""
    setups: dict[Path, Setup] = {}
    unfinished: list[Path] = []
    for config in configs:
        folder = Path(filled(config.run))
        try:
            if not (open_folder(folder) and (folder / LAST).exists() and load_run(folder).finished):
                unfinished.append(folder)
            setups[folder] = known.get(folder) or lean(replace(config, device=pick_device(config.device)))
        except Exception as error:  # whatever it is, it is this run's alone
            failed[str(folder)] = reason(error)
    return setups, [folder for folder in unfinished if folder in setups]


def _train(setups: Mapping[Path, Setup], progress: Progress) -> dict[str, str]:
    """All side by side over one reading."""
    try:
        reading = shared_reading(list(setups.values()))
    except Exception as error:  # none of these can go on, others can
        return {str(folder): reason(error) for folder in setups}
    failed: dict[str, str] = {}
    with ExitStack() as folders, flushing_denormals():
        trainers: list[Trainer] = []
        for folder, setup in setups.items():
            try:
                shares = [
                    share_of(part.samples, stream.samples)
                    for part, stream in zip(setup.parts, reading.streams, strict=True)
                ]
                trainers.append(folders.enter_context(opened(setup, folder, shares)))
            except Exception as error:  # whatever it is, it is this run's alone
                failed[str(folder)] = reason(error)
        failures = run_loop(trainers, reading, progress)
    return failed | {str(folder): reason(error) for folder, error in failures.items()}


def _score_alike(setups: Mapping[Path, Setup], split: str, progress: Progress) -> dict[str, str]:
    """Score runs in one pass for each task; where that fails, each on its own."""
    failed: dict[str, str] = {}
    found: dict[Path, dict[str, Scored]] = {folder: {} for folder in setups}
    for group in _alike(setups):
        ask = partial(_score, split=split, progress=progress, found=found)
        try:
            ask(group)
        except Exception as error:
            logger.warning("scoring one by one: %s", reason(error))
            for folder, part in group.items():
                try:
                    ask({folder: part})
                except Exception as own:  # whatever it is, it is this run's alone
                    failed[str(folder)] = f"trained, but not scored on {split}: {reason(own)}"
    for folder, scored in found.items():
        if str(folder) not in failed:
            try:
                _write(folder, split, scored)
            except StorageError as error:  # another disk may have room
                failed[str(folder)] = reason(error)
    return failed


def _alike(setups: Mapping[Path, Setup]) -> list[dict[Path, Part]]:
    """The parts of runs, together where one pass over one store scores them."""
    groups: dict[tuple[Task, Path], dict[Path, Part]] = {}
    for folder, setup in setups.items():
        for part in setup.parts:
            groups.setdefault((part.task, part.store.path), {})[folder] = part
    return list(groups.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A part of a run on the test split."""

    samples: int
    scores: Scores
    statistics: PictureStatistics


def _score(
    parts: Mapping[Path, Part], split: str, progress: Progress, found: dict[Path, dict[str, Scored]]
) -> None:
    """Score the averaged weights on a split, as `evaluate` does, into `found`."""
    own = {folder: open_dataset(part.config, part.store, split) for folder, part in parts.items()}
    whole, first = read_together(list(own.values()), split, 0), next(iter(parts.values()))
    way = Way(split=split, weights=EMA)
    scores = score(
        {folder: _predictor(folder, part, share_of(own[folder], whole)) for folder, part in parts.items()},
        whole,
        first.task,
        data_set=first.origin.dataset,
        original=True,
        batch_size=filled(first.config.batch_size),
        progress=progress,
    )
    for folder, one in scores.items():
        statistics = picture_statistics(
            one, whole, first.task, way, data_set=first.origin.dataset, step=load_run(folder).step
        )
        found[folder][first.task.name] = Scored(samples=len(whole), scores=one, statistics=statistics)


def _predictor(folder: Path, part: Part, share: Share) -> Predictor:
    run = load_run(folder).for_task(part.task.name)
    predict = model_predictor(model_for_run(run).to(part.config.device), part.task, part.config.precision)
    return seen_through(share, predict)


def _write(folder: Path, split: str, scored: Mapping[str, Scored]) -> None:
    """The scores of a run beside its checkpoints; of several tasks by task. They come last: what has them is
    not scored again.
    """
    for one in scored.values():
        write_statistics(folder, one.statistics)
    by_task = {
        "samples": {task: one.samples for task, one in scored.items()},
        "protocol": {task: one.statistics.about.protocol for task, one in scored.items()},
        "scores": {task: dict(one.scores.overall) for task, one in scored.items()},
    }
    if len(scored) == 1:
        by_task = {name: next(iter(values.values())) for name, values in by_task.items()}
    step = load_run(folder).step
    checkpoint.write_json(folder / SCORES, {"split": split, "weights": EMA, "step": step, **by_task})


def reason(error: Exception) -> str:
    """Why something failed, in one line."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {text}; give less --memory"
    return text if isinstance(error, MMDiffError) else f"{type(error).__name__}: {text}"
