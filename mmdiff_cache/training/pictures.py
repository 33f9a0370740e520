"""What a training sees of itself: the first held-out samples at every check, as one picture a check."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from mmdiff_cache.errors import StoreError
from mmdiff_cache.loader import Batch
from mmdiff_cache.tasks import Task, check_target
from mmdiff_cache.training.build import Part, Setup
from mmdiff_cache.training.folder import PICTURES
from mmdiff_cache.training.scoring import Predictor, Scores
from mmdiff_cache.visuals.colours import legend_entries
from mmdiff_cache.visuals.panels import Sheet, Tile, draw_sheet, truth_and_guess

logger = logging.getLogger(__name__)

SHOWN: Final = 4
"""Samples in a picture."""
QUALITY: Final = 90


def albums(setup: Setup, run: Path) -> "list[Album]":
    """One for each part of a training; several have a folder each."""
    folder, parts = run / PICTURES, setup.parts
    return [Album(one, folder if len(parts) == 1 else folder / one.task.name) for one in parts]


class Album:
    """Keeps what is predicted for the first held-out samples while they are scored, and draws it.

    No features are read for it: the held-out samples pass by at every check.
    """

    def __init__(self, part: Part, folder: Path) -> None:
        self._part, self._folder = part, folder
        self._indices = () if part.held_out is None else part.held_out.indices[:SHOWN]
        self._seen: dict[int, tuple[str, NDArray[Any], NDArray[Any]]] = {}
        """By position in the split: the sample's id, truth and prediction at network size."""

    def watching(self, predict: Predictor) -> Predictor:
        """The same predictor, with a look at what it says of the samples to be shown.

        Raises DataError, naming the sample, for an id that the label set does not have.
        """

        def watched(batch: Batch, sizes: Sequence[tuple[int, int]]) -> Sequence[NDArray[Any]]:
            target = batch.targets[self._part.task.label]
            check_target(target, self._part.label, batch.ids)
            guesses, truths = predict(batch, sizes), target.numpy()
            for row, index in enumerate(batch.indices.tolist()):
                if index in self._indices:
                    self._seen[index] = (batch.ids[row], truths[row].copy(), guesses[row])
            return guesses

        return watched

    def draw(self, step: int, scores: Scores) -> None:
        """Write the picture of a check. A disk that refuses costs the picture, not the training."""
        if not self._seen:
            return
        name = self._folder / f"step-{step:06d}.jpg"
        try:
            sheet = draw_sheet(self._sheet(step, scores))
            self._folder.mkdir(parents=True, exist_ok=True)
            sheet.save(name, quality=QUALITY, subsampling=0)
        except (OSError, StoreError) as error:
            logger.warning("no picture of step %d: %s", step, error)
            with suppress(OSError):
                name.unlink(missing_ok=True)
        self._seen = {}

    def _sheet(self, step: int, scores: Scores) -> Sheet:
        task, label = self._part.task, self._part.label
        images = self._part.samples.reader.images(sorted(self._seen))
        rows: list[Sequence[Tile]] = []
        for image, index in zip(images, sorted(self._seen), strict=True):
            sample_id, truth, guess = self._seen[index]
            truth_tile, guess_tile = truth_and_guess(
                label, truth, guess, image, _caption(task, scores.samples.get(sample_id, {}))
            )
            rows.append([Tile(picture=image, caption=sample_id), guess_tile, truth_tile])
        return Sheet(
            title=f"{task.name}, step {step}",
            note="The first held-out samples, averaged weights, at network size.",
            rows=rows,
            columns=["picture", "prediction", "truth"],
            legend=legend_entries(label.classes),
        )


def _caption(task: Task, scores: Mapping[str, float]) -> str:
    value = scores.get(task.headline)
    return "nothing to score" if value is None else f"{task.headline} {value:.3f}"
