"""Sheets that show what trained runs make of the samples of a store: predictions beside the truth, concept
maps, and how much each timestep counts.

The samples are the first ones of the split, never chosen, and each prediction carries its own score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from mmdiff_cache.config import filled
from mmdiff_cache.loader import Batch
from mmdiff_cache.models.mmdiff import MMDiff
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.store.reader import SplitReader, open_store
from mmdiff_cache.tasks import Task, find_task
from mmdiff_cache.training.build import Model, open_dataset
from mmdiff_cache.training.run import Run, model_for_run
from mmdiff_cache.training.scoring import predict_batch
from mmdiff_cache.visuals import colours
from mmdiff_cache.visuals.panels import Sheet, Tile, truth_and_guess

SCORE_NAMES: Final = {"miou": "mIoU", "s_measure": "S-measure", "abs_rel": "AbsRel"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One run on the samples of a sheet, read from its store alone."""

    run: Run
    task: Task
    model: Model
    label: LabelSpec
    reader: SplitReader
    batch: Batch
    concepts: tuple[str, ...]
    """What the maps beside the features are of."""
    truths: tuple[NDArray[Any], ...]
    predictions: tuple[NDArray[Any], ...]
    scores: tuple[float | None, ...]
    """Each sample's own headline score; None where its label has nothing to score."""


def show(run: Run, split: str, count: int) -> Shown:
    """Predict the first `count` usable samples of a split with a run's averaged weights."""
    task, model = find_task(run.config.task, run.config.label), model_for_run(run)
    dataset = open_dataset(run.config, open_store(run.config.stores[0]), split)
    batch = dataset.batch(range(min(count, len(dataset))))
    reader = dataset.reader
    truths = [reader.original_label(task.label, int(index)) for index in batch.indices]
    sizes = [(truth.shape[0], truth.shape[1]) for truth in truths]
    predictions = predict_batch(model, task, batch, sizes, run.config.precision)
    label = reader.label_specs[task.label]
    metric = task.metric(label, run.origin["dataset"])
    scores = [metric.update(guess, truth) for guess, truth in zip(predictions, truths, strict=True)]
    return Shown(
        run=run,
        task=task,
        model=model,
        label=label,
        reader=reader,
        batch=batch,
        concepts=dataset.concept_names,
        truths=tuple(truths),
        predictions=tuple(predictions),
        scores=tuple(score.get(task.headline) for score in scores),
    )


def prediction_sheet(shown: Sequence[Shown], title: str, note: str) -> Sheet:
    """A row a sample: the picture, then truth and prediction of every task."""
    images = _images(shown[0])
    rows = [
        [
            Tile(picture=image, caption=shown[0].batch.ids[number]),
            *(tile for one in shown for tile in _truth_and_guess(one, number, image)),
        ]
        for number, image in enumerate(images)
    ]
    columns = ["input", *(name for one in shown for name in (f"{one.task.name}, true", "predicted"))]
    named = next((one.label.classes for one in shown if one.label.classes), ())
    return Sheet(title=title, note=note, rows=rows, columns=columns, legend=colours.legend_entries(named))


def concept_sheet(one: Shown, title: str, note: str) -> Sheet | None:
    """A row a sample: the picture, then each concept's map over it; None for a run without concepts."""
    if one.batch.concepts is None:
        return None
    words = one.concepts
    rows = [
        [Tile(picture=image), *(Tile(picture=colours.heat_over(image, heat)) for heat in maps.numpy())]
        for image, maps in zip(_images(one), one.batch.concepts, strict=True)
    ]
    return Sheet(title=title, note=note, rows=rows, columns=["input", *words])


@torch.inference_mode()
def timestep_sheet(one: Shown, title: str, note: str) -> Sheet | None:
    """A row a layer, a column a timestep: what each timestep counts at each place, averaged over the samples.

    Colours run from 0 (dark) to 1 (bright); captions give the mean over all places. None for a model that
    does not weigh timesteps.
    """
    if not isinstance(one.model, MMDiff):
        return None
    states = one.batch.hidden_states.to(next(one.model.parameters()).device)
    found = one.model.aggregation_weights(states)
    if found is None:
        return None
    weights = found.mean(dim=0).float().cpu().numpy()
    rows = [
        [_weight_tile(weights[step, layer]) for step in range(len(weights))]
        for layer in range(weights.shape[1])
    ]
    columns = [f"t = {t:g}" for t in filled(one.run.config.timesteps)]
    return Sheet(title=title, note=note, rows=rows, columns=columns, row_labels=filled(one.run.config.layers))


def _weight_tile(weights: NDArray[np.float32]) -> Tile:
    return Tile(picture=colours.ramp(weights.astype(np.float64)), caption=f"mean {weights.mean():.2f}")


def _truth_and_guess(one: Shown, number: int, image: NDArray[np.uint8]) -> tuple[Tile, Tile]:
    score = one.scores[number]
    caption = (
        "nothing to score"
        if score is None
        else f"{SCORE_NAMES.get(one.task.headline, one.task.headline)} {score:.3f}"
    )
    return truth_and_guess(one.label, one.truths[number], one.predictions[number], image, caption)


def _images(one: Shown) -> NDArray[np.uint8]:
    return one.reader.images([int(index) for index in one.batch.indices])
