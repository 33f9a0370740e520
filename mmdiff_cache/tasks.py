"""What can be read out of the features: one entry a task with its labels, decoder, loss, metric and defaults.

A new task is one more entry in TASKS (and a store whose labels it names).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mmdiff_cache import losses
from mmdiff_cache.config import DecoderName
from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.metrics import (
    ALIGNMENTS,
    Alignment,
    DepthMetric,
    Metric,
    SaliencyMetric,
    SegmentationMetric,
)
from mmdiff_cache.records import LabelKind, LabelSpec
from mmdiff_cache.scenes import SHAPES, TEXTURES

EPOCHS = 20
"""Passes over the training samples when no number of steps is given (Paper: Sec. 4.1)."""
BATCH_SIZE = 8
NOTHING_IGNORED = -1
"""An id that no label has, for label sets without one to ignore."""

SUBSETS: Mapping[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("scenes", "segmentation"): ("shapes", SHAPES),
    ("scenes", "material"): ("materials", TEXTURES),
}
"""By (data set, label set): the classes whose mean IoU is the headline, without easy ones (sky, ground)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One dense prediction task."""

    name: str
    summary: str
    label: str
    """Name of the label set in a store."""
    kind: LabelKind
    vocabulary: str
    """Concept vocabulary that guides it by default."""
    decoder: DecoderName
    loss: Callable[..., Tensor]
    """Of outputs [B out H W], targets [B H W] and their LabelSpec. A batch in parts (`accumulate`) gives the
    targets of the whole of it as `whole`; the parts' losses must then add up to that of the batch.
    """
    predict: Callable[[Tensor], NDArray[Any]]
    """One picture's outputs [out H W] to what the metric scores: class ids, probabilities or metres [H W]."""
    metric: Callable[[LabelSpec, str], Metric]
    """A fresh accumulator for a label set of a data set."""
    headline: str
    """The score by which checkpoints are chosen and tables are led."""
    higher_is_better: bool
    output: Literal["logits", "depth"] = "logits"
    epochs: int = EPOCHS
    batch_size: int = BATCH_SIZE


def find_task(name: str, label: str | None = None) -> Task:
    """The entry of a task, on another label set if one is given. Raises ConfigError if there is none."""
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is not known; there are {', '.join(TASKS)}")
    return TASKS[name] if label is None else replace(TASKS[name], label=label)


def aligning(task: Task, how: str) -> Task:
    """A task of depth that scores what is aligned to the truth. Raises ConfigError for other tasks."""
    if how not in ALIGNMENTS:
        raise ConfigError(f"align must be one of {', '.join(ALIGNMENTS)}, got {how!r}")
    if how == "none":
        return task
    if task.kind != "depth":
        raise ConfigError(f"align {how!r} is for depth; {task.name} has no scale to align, leave it out")
    return replace(task, metric=partial(_depth_metric, align=cast(Alignment, how)))


def out_channels(spec: LabelSpec) -> int:
    """Channels of the last convolution: one a class, or one for a mask or a depth."""
    return len(spec.classes) if spec.kind == "classes" else 1


def headline(task: Task, dataset: str) -> str:
    """The headline score's key on this data set."""
    subset = SUBSETS.get((dataset, task.label))
    return f"{task.headline}_{subset[0]}" if subset else task.headline


def better(task: Task, score: float, than: float | None) -> bool:
    """Whether a headline score beats another; anything beats none."""
    return than is None or (score > than if task.higher_is_better else score < than)


def check_target(target: Tensor, spec: LabelSpec, ids: Sequence[str]) -> None:
    """Raise DataError, naming the sample, for a class id that a label set does not have.

    A loss would fail on it without a word on where it is: by an index error, or on a GPU for good.
    """
    if spec.kind == "depth":
        return
    count = out_channels(spec) if spec.kind == "classes" else 2
    wrong = ((target < 0) | (target >= count)) & (target != _ignore(spec))
    if wrong.any():
        sample = int(wrong.flatten(1).any(dim=1).nonzero()[0])
        known = f"0 to {count - 1}" + ("" if spec.ignore is None else f" and {spec.ignore} (not counted)")
        raise DataError(
            f"label set {spec.name!r} of sample {ids[sample]} has the id "
            f"{int(target[sample][wrong[sample]][0])}, but its ids are {known}; mend the label and extract "
            "again, or 'mmdiff-cache labels add' a mended set"
        )


def _ignore(spec: LabelSpec) -> int:
    return NOTHING_IGNORED if spec.ignore is None else spec.ignore


def _valid_range(spec: LabelSpec) -> tuple[float, float]:
    if spec.valid_range is None:
        raise ConfigError(
            f"label set {spec.name!r} has no valid range of depths; its data set must state one in metres"
        )
    low, high = spec.valid_range
    return float(low), float(high)


def _class_loss(
    outputs: Float[Tensor, "B out H W"], target: Tensor, spec: LabelSpec, whole: Tensor | None = None
) -> Tensor:
    return losses.cross_entropy(outputs, target, _ignore(spec), whole)


def _class_map(outputs: Float[Tensor, "out H W"]) -> NDArray[np.int64]:
    return outputs.argmax(dim=0).numpy()


def _class_metric(spec: LabelSpec, dataset: str) -> Metric:
    subset = SUBSETS.get((dataset, spec.name))
    return SegmentationMetric(spec.classes, ignore=spec.ignore, subsets=dict([subset]) if subset else None)


def _mask_loss(
    outputs: Float[Tensor, "B 1 H W"], target: Tensor, spec: LabelSpec, whole: Tensor | None = None
) -> Tensor:
    return losses.bce_soft_iou(outputs, target, _ignore(spec), whole)


def _probability(outputs: Float[Tensor, "1 H W"]) -> NDArray[np.float32]:
    return outputs[0].sigmoid().numpy()


def _mask_metric(spec: LabelSpec, dataset: str) -> Metric:
    return SaliencyMetric(ignore=spec.ignore)


def _depth_loss(
    outputs: Float[Tensor, "B 1 H W"], target: Tensor, spec: LabelSpec, whole: Tensor | None = None
) -> Tensor:
    return losses.scale_invariant_log(outputs, target, _valid_range(spec), whole)


def _metres(outputs: Float[Tensor, "1 H W"]) -> NDArray[np.float32]:
    return outputs[0].numpy()


def _depth_metric(spec: LabelSpec, dataset: str, align: Alignment = "none") -> Metric:
    return DepthMetric(_valid_range(spec), spec.crop, align)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="segmentation",
            summary="which class each pixel belongs to",
            label="segmentation",
            kind="classes",
            vocabulary="segmentation",
            decoder="deeplabv3plus",
            loss=_class_loss,
            predict=_class_map,
            metric=_class_metric,
            headline="miou",
            higher_is_better=True,
        ),
        Task(
            name="material",
            summary="which texture the object at each pixel has",
            label="material",
            kind="classes",
            vocabulary="segmentation",
            decoder="deeplabv3plus",
            loss=_class_loss,
            predict=_class_map,
            metric=_class_metric,
            headline="miou",
            higher_is_better=True,
        ),
        Task(
            name="saliency",
            summary="the object that stands out",
            label="saliency",
            kind="mask",
            vocabulary="saliency",
            decoder="dpt",
            loss=_mask_loss,
            predict=_probability,
            metric=_mask_metric,
            headline="s_measure",
            higher_is_better=True,
        ),
        Task(
            name="depth",
            summary="metres to the surface at each pixel",
            label="depth",
            kind="depth",
            vocabulary="depth",
            decoder="dpt",
            loss=_depth_loss,
            predict=_metres,
            metric=_depth_metric,
            headline="abs_rel",
            higher_is_better=False,
            output="depth",
        ),
    )
}
