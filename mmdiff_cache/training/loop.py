"""The loop of stage two: one reading of the samples, and one training that takes it or several side by side.

Each training computes exactly what it would alone: it has its own weights, random state and folder. What they
share is the reading.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmdiff_cache.loader import CachedFeatureDataset, make_loader
from mmdiff_cache.records import Progress
from mmdiff_cache.tasks import Task
from mmdiff_cache.training.scoring import Scores, score
from mmdiff_cache.training.trainer import Trainer

Failures = dict[Path, Exception]
"""What trainings failed with, by their folders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The samples of a loop, and the order in which they come."""

    samples: CachedFeatureDataset
    held_out: CachedFeatureDataset | None
    """What picks the best checkpoint; None where nothing is held out."""
    batch_size: int
    seed: int


def run_loop(trainers: Sequence[Trainer], reading: Reading, progress: Progress) -> Failures:
    """Train each to its last step. One that fails stays where it is, and the others go on.

    Trainings may stand at different steps; those ahead wait. Progress tells the step of those behind.
    """
    failures: Failures = {}
    going = [trainer for trainer in trainers if not trainer.finished]
    if not going:
        return failures
    first, last = min(trainer.step for trainer in going), max(trainer.steps for trainer in going)
    batches = make_loader(
        reading.samples,
        reading.batch_size,
        seed=reading.seed,
        drop_last=True,
        start=first,
        steps=last - first,
    )
    for step, batch in enumerate(batches, first):
        at_it = [trainer for trainer in going if trainer.step == step]
        _each(at_it, lambda trainer: trainer.take(batch), failures)  # noqa: B023 - called at once
        if reading.held_out is not None:
            _check([trainer for trainer in at_it if trainer.check_is_due], reading.held_out, failures)
        _each(at_it, Trainer.save_if_due, failures)
        states = [trainer.state for trainer in at_it]
        progress(step + 1, last, states[0] if len(trainers) == 1 else f"{len(going)} trainings")
        going = [trainer for trainer in going if not (trainer.finished or trainer.folder in failures)]
        if not going:
            break
    return failures


def _each(trainers: Iterable[Trainer], act: Callable[[Trainer], None], failures: Failures) -> None:
    """Let each act that has not failed, and take down what it fails with."""
    for trainer in trainers:
        if trainer.folder not in failures:
            try:
                act(trainer)
            except Exception as error:  # whatever it is, it is this training's alone
                failures[trainer.folder] = error


def _check(due: Sequence[Trainer], held_out: CachedFeatureDataset, failures: Failures) -> None:
    """Score the held-out samples for all that are due, in one pass for each task."""
    due = [trainer for trainer in due if trainer.folder not in failures]
    for task in dict.fromkeys(trainer.setup.task for trainer in due):
        group = [trainer for trainer in due if trainer.setup.task == task]
        try:
            found = _score(group, task, held_out)
        except Exception:  # one's predictions cannot be scored: the others' can
            found = {}
            _each(group, lambda trainer: found.update(_score([trainer], task, held_out)), failures)  # noqa: B023
        _each(group, lambda trainer: trainer.note_scores(found[trainer.folder]), failures)  # noqa: B023


def _score(
    trainers: Sequence[Trainer], task: Task, held_out: CachedFeatureDataset
) -> dict[Path, dict[str, Scores]]:
    """Each training's scores by weights, from one pass over the held-out samples."""
    predictors = {trainer.folder: trainer.predictors() for trainer in trainers}
    found = score(
        {(folder, name): predict for folder, named in predictors.items() for name, predict in named.items()},
        held_out,
        task,
        data_set=trainers[0].setup.origin.dataset,
        original=False,
        batch_size=trainers[0].batch_size,
    )
    return {folder: {name: found[folder, name] for name in named} for folder, named in predictors.items()}
