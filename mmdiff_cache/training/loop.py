"""The loop of stage two: one reading of the samples, and one training that takes it or several side by side.

Each training computes exactly what it would alone: it has its own weights, random state and folder. What they
share is the reading.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from traceback import clear_frames

from mmdiff_cache.config import filled
from mmdiff_cache.loader import Batch, CachedFeatureDataset, make_loader
from mmdiff_cache.records import Progress
from mmdiff_cache.training.build import Setup
from mmdiff_cache.training.folder import working
from mmdiff_cache.training.scoring import score
from mmdiff_cache.training.trainer import Scored, Trainer
from mmdiff_cache.training.unified import turns

Failures = dict[Path, Exception]
"""What trainings failed with, by their folders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The samples that teach one part of a training: one task."""

    samples: CachedFeatureDataset
    held_out: CachedFeatureDataset | None
    """What picks the best checkpoint; None where nothing is held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The samples of a loop, and the order in which they come."""

    streams: tuple[Stream, ...]
    """One for each part of the trainings."""
    ratio: tuple[float, ...]
    """Of the batches of the streams."""
    batch_size: int
    seed: int

    @classmethod
    def of(cls, setup: Setup) -> "Reading":
        """What one training reads alone."""
        return cls(
            streams=tuple(Stream(samples=part.samples, held_out=part.held_out) for part in setup.parts),
            ratio=setup.ratio,
            batch_size=filled(setup.config.batch_size),
            seed=setup.config.reading_seed,
        )

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """The batches of steps `start` to `stop - 1`, each with the number of its stream."""
        before, after = Counter(turns(self.ratio, 0, start)), Counter(turns(self.ratio, start, stop))
        loaders = [
            make_loader(
                stream.samples,
                self.batch_size,
                seed=self.seed,
                drop_last=True,
                start=before[number],
                steps=after[number],
            )
            for number, stream in enumerate(self.streams)
        ]
        for number in turns(self.ratio, start, stop):
            yield number, next(loaders[number])


def run_loop(trainers: Sequence[Trainer], reading: Reading, progress: Progress) -> Failures:
    """Train each to its last step. One that fails stays where it is, and the others go on.

    A reading that fails ends all that have not finished; what failed before keeps its own reason.
    Trainings may stand at different steps; those ahead wait. Progress tells the step of those behind.
    """
    failures: Failures = {}
    going = [trainer for trainer in trainers if not trainer.finished]
    if not going:
        return failures
    first, last = min(trainer.step for trainer in going), max(trainer.steps for trainer in going)
    try:
        for step, (part, batch) in enumerate(reading.batches(first, last), first):
            at_it = [trainer for trainer in going if trainer.step == step]
            _each(at_it, lambda trainer: trainer.take(batch, part), failures)  # noqa: B023 - called at once
            _check([trainer for trainer in at_it if trainer.check_is_due], reading, failures)
            _each(at_it, Trainer.save_if_due, failures)
            states = [trainer.state for trainer in at_it]
            progress(step + 1, last, states[0] if len(trainers) == 1 else f"{len(going)} trainings")
            going = [trainer for trainer in going if not (trainer.finished or trainer.folder in failures)]
            if not going:
                break
    except Exception as error:
        failures |= {one.folder: error for one in going if not (one.finished or one.folder in failures)}
        if not failures:
            raise
    return failures


def _each(trainers: Sequence[Trainer], act: Callable[[Trainer], None], failures: Failures) -> None:
    """Let each act that has not failed, and take down what it fails with.

    What it had in memory is then for its neighbours, who may have run out of it as well.
    """
    for trainer in trainers:
        if trainer.folder not in failures:
            try:
                with working(trainer.folder):
                    act(trainer)
            except Exception as error:  # whatever it is, it is this training's alone
                failures[trainer.folder] = error
                if len(trainers) > 1:
                    _forget(error)
                    trainer.let_go()


def _forget(error: BaseException | None) -> None:
    """Let go of what the functions held that an error came through, and those it came from."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _check(due: Sequence[Trainer], reading: Reading, failures: Failures) -> None:
    """Score the held-out samples for all that are due, in one pass for each part and task."""
    found: dict[Path, Scored] = {trainer.folder: {} for trainer in due}
    for part, stream in enumerate(reading.streams):
        able = [trainer for trainer in due if trainer.folder not in failures]
        if stream.held_out is None:
            return
        for task in dict.fromkeys(trainer.setup.parts[part].task for trainer in able):
            group = [trainer for trainer in able if trainer.setup.parts[part].task == task]
            ask = partial(_score, part=part, held_out=stream.held_out, found=found)
            try:
                ask(group)
            except Exception:  # one's predictions cannot be scored: the others' can
                _each(group, lambda trainer: ask([trainer]), failures)  # noqa: B023 - called at once
    _each(due, lambda trainer: trainer.note_scores(found[trainer.folder]), failures)


def _score(
    trainers: Sequence[Trainer], part: int, held_out: CachedFeatureDataset, found: dict[Path, Scored]
) -> None:
    """Score a part of trainings of one task in one pass, into `found`."""
    task = trainers[0].setup.parts[part]
    scores = score(
        {(t.folder, name): predict for t in trainers for name, predict in t.predictors(part).items()},
        held_out,
        task.task,
        data_set=task.origin.dataset,
        original=False,
        batch_size=trainers[0].batch_size,
    )
    for (folder, weights), value in scores.items():
        found[folder].setdefault(weights, {})[task.task.name] = value
