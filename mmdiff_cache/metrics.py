"""The metrics: what one picture adds, at its label's size, and the scores of what all pictures add up to.

A picture's statistics are a few numbers that sum; scores are computed from such a sum and in no other way, so
that any weighting of the pictures can be scored without their predictions (`experiments.statistics`).
Scores are plain JSON, in fractions or metres, never percent.
Protocols: docs/paper-notes.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import numpy as np
from jaxtyping import Float, Float64, Integer
from numpy.typing import NDArray

from .errors import DataError

IGNORE = 255
DELTA = 1.25
"""delta_k is the share of pixels whose ratio to the truth, either way round, is below 1.25^k."""
THRESHOLDS = 256
"""Of the F curve."""
ERRORS = ("abs_rel", "rmse", "delta1", "delta2", "delta3", "log10")
LOWER_IS_BETTER = frozenset({"mae", "abs_rel", "rmse", "log10"})
"""Of all other scores more is better."""
COUNTS = ("samples", "skipped")
"""What stands beside the scores and is none."""
Alignment = Literal["none", "median", "lstsq"]
ALIGNMENTS: tuple[Alignment, ...] = get_args(Alignment)
"""What a predicted depth is given of the truth before it is scored: nothing, a scale, or scale and shift."""


class Metric(ABC):
    """Counts pictures with `update` and sums them up with `scores`."""

    own: tuple[str, ...]
    """The scores that say something of a single picture; the first has a value wherever anything counts."""
    nothing: str
    """What is wrong where no picture counts."""

    def __init__(self, length: int) -> None:
        self.sums = np.zeros(length)

    @abstractmethod
    def statistics(self, prediction: NDArray[Any], target: NDArray[Any]) -> Float64[np.ndarray, " K"]:
        """What one picture adds. Raises DataError for values that are no prediction or no label."""

    @abstractmethod
    def scores_of(self, sums: Float64[np.ndarray, "D K"]) -> dict[str, Float64[np.ndarray, " D"]]:
        """The scores of D weighted sums, classes as `iou.ball`, and COUNTS; NaN where nothing counts."""

    def add(self, statistics: Float64[np.ndarray, " K"]) -> dict[str, float]:
        """Count one picture by its statistics; return its own scores, none where it has no known pixel."""
        self.sums += statistics
        found = self.scores_of(statistics[None])
        return {name: found[name].item() for name in self.own if not np.isnan(found[name])}

    def update(self, prediction: NDArray[Any], target: NDArray[Any]) -> dict[str, float]:
        """Count one picture; return its own scores, none where it has no known pixel."""
        return self.add(self.statistics(prediction, target))

    def scores(self) -> dict[str, Any]:
        """The scores of everything counted so far, as JSON. Raises DataError if that is nothing."""
        found = {name: value.item() for name, value in self.scores_of(self.sums[None]).items()}
        if np.isnan(found[self.own[0]]):
            raise DataError(self.nothing)
        return _as_json(found)


def _as_json(found: Mapping[str, float]) -> dict[str, Any]:
    """Dotted names as groups, counts as whole numbers, NaN as None."""
    result: dict[str, Any] = {}
    for name, number in found.items():
        value = None if np.isnan(number) else int(number) if name in COUNTS else number
        group, dot, member = name.partition(".")
        if dot:
            result.setdefault(group, {})[member] = value
        else:
            result[name] = value
    return result


class SegmentationMetric(Metric):
    """Intersection over union from one confusion matrix over all pictures; `ignore` pixels are not counted.

    A mean is taken over the classes that occur in the ground truth: a class that no label shows has no IoU,
    and predicting it costs only the classes it displaces. `subsets` names means over some of the classes.

    Statistics are all that the scores need of the matrix, in pixels: of each class its row's sum (truth), its
    column's sum (prediction) and the element on both; then 1 for the picture.
    """

    own = ("miou",)
    nothing = "mean IoU needs a labelled pixel; every label is void or none was given"

    def __init__(
        self,
        classes: Sequence[str],
        *,
        ignore: int | None = IGNORE,
        subsets: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(3 * len(classes) + 1)
        self.classes, self.ignore = tuple(classes), ignore
        self.subsets = {
            name: [self.classes.index(member) for member in members]
            for name, members in (subsets or {}).items()
        }

    def statistics(
        self, prediction: Integer[np.ndarray, "H W"], target: Integer[np.ndarray, "H W"]
    ) -> Float64[np.ndarray, " K"]:
        """Class ids, both [H W]."""
        known = np.ones(target.shape, dtype=bool) if self.ignore is None else target != self.ignore
        truth, guess = target[known].astype(np.int64), prediction[known].astype(np.int64)
        count = len(self.classes)
        for what, ids in (("label", truth), ("prediction", guess)):
            if ids.size and not 0 <= ids.min() <= ids.max() < count:
                raise DataError(
                    f"class ids of a {what} must lie in 0..{count - 1} or be {self.ignore}, "
                    f"got {ids.min()}..{ids.max()}; check the label set's classes"
                )
        pixels = [np.bincount(ids, minlength=count) for ids in (truth, guess, truth[truth == guess])]
        return np.concatenate([*pixels, [1]]).astype(np.float64)

    def scores_of(self, sums: Float64[np.ndarray, "D K"]) -> dict[str, Float64[np.ndarray, " D"]]:
        """miou, miou_<subset>, pixel_accuracy, the IoU by class (NaN where no label shows it), samples."""
        truth, guess, hits = np.split(sums[..., :-1], 3, axis=-1)
        iou = _ratio(hits, np.where(truth > 0, truth + guess - hits, 0))
        return {
            "miou": _mean(iou),
            **{f"miou_{name}": _mean(iou[..., members]) for name, members in self.subsets.items()},
            "pixel_accuracy": _ratio(hits.sum(axis=-1), truth.sum(axis=-1)),
            **{f"iou.{name}": iou[..., number] for number, name in enumerate(self.classes)},
            "samples": sums[..., -1],
        }


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Element by element, NaN where the whole is nothing."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis, without what is NaN."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1).astype(np.float64))


class SaliencyMetric(Metric):
    """S-measure (alpha 0.5), maximum F (beta^2 0.3) and MAE, all by pysodmetrics.

    A prediction is quantised to 0..255 and then stretched so that each picture's minimum is 0 and its maximum
    is 1, before all three, as the field's reference code does. F is the maximum over 256 thresholds of the
    curve that is averaged over pictures first. Ignored pixels count as rightly predicted background.

    Statistics are S-measure, MAE and the F curve of a picture, and 1.
    """

    own = ("s_measure", "max_f", "mae")
    nothing = "the saliency metrics need a known pixel; every mask is void or none was given"

    def __init__(self, *, ignore: int | None = IGNORE) -> None:
        # Loading it pulls in OpenCV and SciPy, half a second that only saliency should pay.
        from py_sod_metrics import MAE, FmeasureHandler, FmeasureV2, Smeasure

        super().__init__(3 + THRESHOLDS)
        self.ignore = ignore
        self._structure, self._error = Smeasure(alpha=0.5), MAE()
        handler = FmeasureHandler(with_dynamic=True, with_adaptive=False, beta=0.3)
        self._f = FmeasureV2(metric_handlers={"f": handler})
        self._curves = cast(list[NDArray[np.float64]], handler.dynamic_results)

    def statistics(
        self, prediction: Float[np.ndarray, "H W"], target: Integer[np.ndarray, "H W"]
    ) -> Float64[np.ndarray, " K"]:
        """Probabilities in [0, 1] and a mask of 0, 1 or `ignore`, both [H W]. A mask of `ignore` alone does
        not count.
        """
        if not (prediction.min() >= 0 and prediction.max() <= 1):  # false for NaN, too
            raise DataError("a saliency prediction must be probabilities in [0, 1]; take the logits' sigmoid")
        if self.ignore is not None and (target == self.ignore).all():
            return np.zeros_like(self.sums)
        quantised = np.round(prediction * 255).astype(np.uint8)
        truth = np.where(target == 1, 255, 0).astype(np.uint8)
        if self.ignore is not None:
            quantised[target == self.ignore] = 0
        for metric in (self._structure, self._error, self._f):
            metric.step(pred=quantised, gt=truth)
        # taken out again: they would keep every picture
        numbers = [self._structure.sms.pop(), self._error.maes.pop(), *self._curves.pop(), 1]
        return np.array(numbers, dtype=np.float64)

    def scores_of(self, sums: Float64[np.ndarray, "D K"]) -> dict[str, Float64[np.ndarray, " D"]]:
        """s_measure, max_f, mae and samples."""
        means = _ratio(sums[..., :-1], sums[..., -1:])
        return {
            "s_measure": means[..., 0],
            "max_f": means[..., 2:].max(axis=-1),
            "mae": means[..., 1],
            "samples": sums[..., -1],
        }


class DepthMetric(Metric):
    """AbsRel, RMSE, log10 and delta_1..3 of metric depth: of each picture first, then the mean over pictures.

    Pixels count where low < truth < high; predictions are clamped to that range (NaN counts as low), after
    they were aligned, if they are, on the same pixels. With a crop (top, bottom, left, right) only those rows
    and columns count. A picture without a valid pixel is left out of the mean and counted as skipped.

    Statistics are a picture's ERRORS, 1 if it counts, 1 if it is skipped.
    """

    own = ERRORS

    def __init__(
        self,
        valid_range: tuple[float, float],
        crop: tuple[int, int, int, int] | None = None,
        align: Alignment = "none",
    ) -> None:
        super().__init__(len(ERRORS) + 2)
        self.valid_range = valid_range
        self.align: Alignment = align
        self.nothing = f"depth metrics need a pixel whose depth lies in {valid_range} m; none does"
        top, bottom, left, right = crop or (None, None, None, None)
        self._window = slice(top, bottom), slice(left, right)

    def statistics(
        self, prediction: Float[np.ndarray, "H W"], target: Float[np.ndarray, "H W"]
    ) -> Float64[np.ndarray, " K"]:
        """Depths in metres, both [H W]."""
        low, high = self.valid_range
        prediction, target = prediction[self._window], target[self._window]
        valid = (target > low) & (target < high)
        if not valid.any():
            return np.array([*(0.0 for _ in ERRORS), 0.0, 1.0])
        truth = target[valid].astype(np.float64)
        guess = np.nan_to_num(prediction[valid].astype(np.float64), nan=low, posinf=high, neginf=low)
        errors = depth_errors(np.clip(aligned(guess, truth, self.align), low, high), truth)
        return np.array([*(errors[name] for name in ERRORS), 1.0, 0.0])

    def scores_of(self, sums: Float64[np.ndarray, "D K"]) -> dict[str, Float64[np.ndarray, " D"]]:
        """abs_rel, rmse (metres), delta1, delta2, delta3, log10, samples, skipped."""
        means = _ratio(sums[..., :-2], sums[..., -2:-1])
        errors = {name: means[..., number] for number, name in enumerate(ERRORS)}
        return {**errors, "samples": sums[..., -2], "skipped": sums[..., -1]}


def aligned(guess: NDArray[np.float64], truth: NDArray[np.float64], how: Alignment) -> NDArray[np.float64]:
    """One picture's valid depths, brought to the truth: by the ratio of the medians, or by least squares.

    A median that is not positive has no ratio; such a picture stays as it is.
    """
    if how == "median":
        middle = np.median(guess)
        return guess * (np.median(truth) / middle) if middle > 0 else guess
    if how == "lstsq":
        columns = np.stack([guess, np.ones_like(guess)], axis=1)
        return columns @ np.linalg.lstsq(columns, truth)[0]
    return guess


def depth_errors(guess: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, float]:
    """The six numbers for one picture's valid pixels; both positive, in metres."""
    ratio = np.maximum(guess / truth, truth / guess)
    return {
        "abs_rel": float(np.mean(np.abs(guess - truth) / truth)),
        "rmse": float(np.sqrt(np.mean((guess - truth) ** 2))),
        **{f"delta{k}": float(np.mean(ratio < DELTA**k)) for k in (1, 2, 3)},
        "log10": float(np.mean(np.abs(np.log10(guess) - np.log10(truth)))),
    }
