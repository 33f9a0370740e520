"""From a batch to predictions, and to scores. Evaluation and prediction both go through here."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from mmdiff_cache.fitting import asked_size, from_network, to_network
from mmdiff_cache.loader import Batch, CachedFeatureDataset, make_loader
from mmdiff_cache.records import LabelSpec, Progress
from mmdiff_cache.tasks import Task
from mmdiff_cache.training.build import Model


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision where the configuration asks for it; losses and metrics compute in float32 anyway."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def forward_batch(
    model: Model, batch: Batch, size: tuple[int, int] | None = None, precision: str = "float32"
) -> Float[Tensor, "B out H W"]:
    """A model's outputs on its own device, at `size` = (H, W); by default the size of the network's input."""
    device = next(model.parameters()).device
    with autocast(device, precision):
        return model(
            batch.hidden_states.to(device, non_blocking=True),
            None if batch.concepts is None else batch.concepts.to(device, non_blocking=True),
            tuple(features.to(device, non_blocking=True) for features in batch.discriminative),
            size,
        ).float()


@torch.inference_mode()
def predict_batch(
    model: Model,
    task: Task,
    batch: Batch,
    sizes: Sequence[tuple[int, int]],
    precision: str = "float32",
    mirrored: Batch | None = None,
) -> list[NDArray[Any]]:
    """Class ids, probabilities or metres for each sample, [H W] at its own size = (H, W).

    Outputs are resized to that size first and turned into predictions there. With the same samples `mirrored`
    they are the mean of both outputs, these mirrored back: of logits, or of metres.
    """
    predictions: dict[int, NDArray[Any]] = {}
    for size in dict.fromkeys(sizes):
        rows = [row for row, wanted in enumerate(sizes) if wanted == size]
        outputs = forward_batch(model, select(batch, rows), size, precision).cpu()
        if mirrored is not None:
            twins = forward_batch(model, select(mirrored, rows), size, precision).cpu()
            outputs = (outputs + twins.flip(-1)) / 2
        predictions.update({row: task.predict(output) for row, output in zip(rows, outputs, strict=True)})
    return [predictions[row] for row in range(len(sizes))]


def select(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some samples of a batch; a range is not copied. The batch itself where all are chosen."""
    if len(rows) == len(batch.ids):
        return batch
    at = slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows)
    return Batch(
        hidden_states=batch.hidden_states[at],
        concepts=None if batch.concepts is None else batch.concepts[at],
        discriminative=tuple(features[at] for features in batch.discriminative),
        targets={name: target[at] for name, target in batch.targets.items()},
        indices=batch.indices[at],
        ids=tuple(batch.ids[row] for row in rows),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What a set of predictions is worth."""

    overall: Mapping[str, Any]
    """The metric's scores over all samples, as JSON."""
    samples: Mapping[str, Mapping[str, float]]
    """Each sample's own scores, by sample id; empty where a label has nothing to score."""
    statistics: Float64[np.ndarray, "n K"]
    """What each sample adds, in the same order; `overall` are the scores of the sum."""


Predictor = Callable[[Batch, Sequence[tuple[int, int]]], Sequence[NDArray[Any]]]
"""Anything that answers a batch with one prediction a sample, at the sizes asked for."""


Name = TypeVar("Name")
"""Whatever a caller tells predictors apart by."""


def model_predictor(
    model: Model, task: Task, precision: str, mirrored: Callable[[Batch], Batch] | None = None
) -> Predictor:
    """A trained model as a predictor; `mirrored` gives a batch's samples mirrored, to average over both."""

    def predict(batch: Batch, sizes: Sequence[tuple[int, int]]) -> list[NDArray[Any]]:
        twins = None if mirrored is None else mirrored(batch)
        return predict_batch(model, task, batch, sizes, precision, twins)

    return predict


def seen_through(view: Callable[[Batch], Batch], predictor: Predictor) -> Predictor:
    """A predictor on its own part of a batch that was read for several."""

    def predict(batch: Batch, sizes: Sequence[tuple[int, int]]) -> Sequence[NDArray[Any]]:
        return predictor(view(batch), sizes)

    return predict


def score(
    predictors: Mapping[Name, Predictor],
    dataset: CachedFeatureDataset,
    task: Task,
    *,
    data_set: str,
    original: bool,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[Name, Scores]:
    """Score several predictors in one pass over a data set that yields the task's labels.

    `original` scores at the labels' original sizes, else at the network's input size. Batches are streamed.
    """
    label = dataset.reader.label_specs[task.label]
    if not original:
        label = replace(label, crop=None)  # it counts pixels of the original
    fit = dataset.store.manifest.fit if original else "squash"
    if fit == "crop":
        label = replace(label, crop=None)  # _truths leaves out what lies outside of it
    metrics = {name: task.metric(label, data_set) for name in predictors}
    own: dict[Name, dict[str, Mapping[str, float]]] = {name: {} for name in predictors}
    rows: dict[Name, list[NDArray[np.float64]]] = {name: [] for name in predictors}
    done = 0
    for batch in make_loader(dataset, batch_size, shuffle=False):
        truths = _truths(dataset, task.label, batch, original)
        sizes = [(truth.shape[0], truth.shape[1]) for truth in truths]
        asked = [asked_size(size, fit) for size in sizes]
        for name, predictor in predictors.items():
            guesses = predictor(batch, asked)
            for sample_id, guess, size, truth in zip(batch.ids, guesses, sizes, truths, strict=True):
                rows[name].append(metrics[name].statistics(from_network(guess, size, fit), truth))
                own[name][sample_id] = metrics[name].add(rows[name][-1])
        done += len(batch.ids)
        if progress is not None:
            progress(done, len(dataset), "evaluating")
    return {
        name: Scores(overall=metrics[name].scores(), samples=own[name], statistics=np.stack(rows[name]))
        for name in predictors
    }


def _truths(dataset: CachedFeatureDataset, label: str, batch: Batch, original: bool) -> list[NDArray[Any]]:
    if not original:
        return list(batch.targets[label].numpy())
    spec, fit = dataset.reader.label_specs[label], dataset.store.manifest.fit
    truths = [dataset.reader.original_label(label, int(index)) for index in batch.indices]
    return truths if fit != "crop" else [_seen(truth, spec) for truth in truths]


def _seen(truth: NDArray[Any], spec: LabelSpec) -> NDArray[Any]:
    """What a network that was given the middle of a picture can be asked for."""
    if spec.crop is not None:
        top, bottom, left, right = spec.crop
        blank = np.full_like(truth, spec.fill)
        blank[top:bottom, left:right] = truth[top:bottom, left:right]
        truth = blank
    return to_network(truth, "crop", spec.fill)
