"""Trains runs that share a reading, and scores them on the test split in one pass."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.errors import MMDiffError
from mmdiff_cache.loader import CachedFeatureDataset
from mmdiff_cache.records import Progress
from mmdiff_cache.sweeps.results import SCORES
from mmdiff_cache.sweeps.shared import SharedSamples, view_of
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.build import Setup, open_dataset, set_up
from mmdiff_cache.training.checkpoint import EMA, LAST
from mmdiff_cache.training.folder import open_folder
from mmdiff_cache.training.loop import Reading, run_loop
from mmdiff_cache.training.resolve import TRAIN_SPLIT, pick_device
from mmdiff_cache.training.run import flushing_denormals, load_run, model_for_run, opened
from mmdiff_cache.training.scoring import Predictor, model_predictor, score, seen_through
from mmdiff_cache.training.trainer import Trainer

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


def run_part(job: Job, progress: Progress) -> dict[str, str]:
    """Train what is not finished, score what is not scored; the reasons of what failed, by folder.

    Raises nothing that is one run's own affair, and leaves finished runs as they are.
    """
    failed: dict[str, str] = {}
    setups, unfinished = _set_up_all(job.configs, failed)
    if unfinished:
        failed |= _train({folder: setups[folder] for folder in unfinished}, progress)
    if job.test_split is not None:
        rest = {f: setup for f, setup in setups.items() if str(f) not in failed and not (f / SCORES).exists()}
        failed |= _score_alike(rest, job.test_split, _after(job.steps, progress))
    return failed


def _after(steps: int, progress: Progress) -> Progress:
    """Progress of what comes when all steps are made."""

    def scoring(done: int, total: int, state: str) -> None:
        progress(steps, steps, f"scoring {done} of {total}")

    return scoring


def _set_up_all(
    configs: Sequence[TrainConfig], failed: dict[str, str]
) -> tuple[dict[Path, Setup], list[Path]]:
    """What each needs, and the folders of those that are not finished."""
    setups: dict[Path, Setup] = {}
    unfinished: list[Path] = []
    for config in configs:
        folder = Path(filled(config.run))
        try:
            if not (open_folder(folder) and (folder / LAST).exists() and load_run(folder).finished):
                unfinished.append(folder)
            setups[folder] = set_up(replace(config, device=pick_device(config.device)))
        except Exception as error:  # whatever it is, it is this run's alone
            failed[str(folder)] = reason(error)
    return setups, [folder for folder in unfinished if folder in setups]


def _train(setups: Mapping[Path, Setup], progress: Progress) -> dict[str, str]:
    """All side by side over one reading."""
    shared, reading = _reading(list(setups.values()))
    failed: dict[str, str] = {}
    with ExitStack() as folders, flushing_denormals():
        trainers: list[Trainer] = []
        for folder, setup in setups.items():
            try:
                view = view_of(setup.samples, shared)
                trainers.append(folders.enter_context(opened(setup, folder, view)))
            except Exception as error:  # whatever it is, it is this run's alone
                failed[str(folder)] = reason(error)
        try:
            failures = run_loop(trainers, reading, progress)
        except Exception as error:  # the reading itself: none of them can go on
            failures = {trainer.folder: error for trainer in trainers if not trainer.finished}
    return failed | {str(folder): reason(error) for folder, error in failures.items()}


def _reading(setups: Sequence[Setup]) -> tuple[SharedSamples, Reading]:
    """One reading of all that the runs take; it may keep as many bytes as the most generous of them."""
    first = setups[0].config
    memory = max(setup.config.memory for setup in setups)
    held_out = [setup.held_out for setup in setups if setup.held_out is not None]
    shared = SharedSamples(
        [setup.samples for setup in setups], TRAIN_SPLIT, int(memory * (1 - first.holdout))
    )
    return shared, Reading(
        samples=shared,
        held_out=SharedSamples(held_out, TRAIN_SPLIT, int(memory * first.holdout)) if held_out else None,
        batch_size=filled(first.batch_size),
        seed=first.reading_seed,
    )


def _score_alike(setups: Mapping[Path, Setup], split: str, progress: Progress) -> dict[str, str]:
    """Score runs in one pass for each task; where that fails, each on its own."""
    failed: dict[str, str] = {}
    for task in dict.fromkeys(setup.task for setup in setups.values()):
        group = {folder: setup for folder, setup in setups.items() if setup.task == task}
        try:
            _score(group, split, progress)
        except Exception as error:
            logger.warning("scoring one by one: %s", reason(error))
            for folder, setup in group.items():
                try:
                    _score({folder: setup}, split, progress)
                except Exception as own:  # whatever it is, it is this run's alone
                    failed[str(folder)] = f"trained, but not scored on {split}: {reason(own)}"
    return failed


def _score(setups: Mapping[Path, Setup], split: str, progress: Progress) -> None:
    """Score the averaged weights on a split, as `evaluate` does, and write the scores beside them."""
    samples = {folder: open_dataset(setup.config, setup.store, split) for folder, setup in setups.items()}
    shared, first = SharedSamples(list(samples.values()), split, 0), next(iter(setups.values()))
    found = score(
        {folder: _predictor(folder, setup, samples[folder], shared) for folder, setup in setups.items()},
        shared,
        first.task,
        data_set=first.origin.dataset,
        original=True,
        batch_size=filled(first.config.batch_size),
        progress=progress,
    )
    for folder, scores in found.items():
        values = {"split": split, "weights": EMA, "samples": len(shared), "scores": dict(scores.overall)}
        checkpoint.write_json(folder / SCORES, values)


def _predictor(folder: Path, setup: Setup, own: CachedFeatureDataset, shared: SharedSamples) -> Predictor:
    model = model_for_run(folder).to(setup.config.device)
    return seen_through(view_of(own, shared), model_predictor(model, setup.task, setup.config.precision))


def reason(error: Exception) -> str:
    """Why something failed, in one line."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {text}; give less --memory"
    return text if isinstance(error, MMDiffError) else f"{type(error).__name__}: {text}"
