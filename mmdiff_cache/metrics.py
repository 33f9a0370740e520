"""The metrics, as accumulators: `update` takes one picture at its label's size, `scores` sums up.

`update` returns the picture's own scores; `scores` is plain JSON, in fractions or metres, never percent.
Protocols: docs/paper-notes.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import numpy as np
from jaxtyping import Float, Integer
from numpy.typing import NDArray

from .errors import DataError

IGNORE = 255
DELTA = 1.25
"""delta_k is the share of pixels whose ratio to the truth, either way round, is below 1.25^k."""
Alignment = Literal["none", "median", "lstsq"]
ALIGNMENTS: tuple[Alignment, ...] = get_args(Alignment)
"""What a predicted depth is given of the truth before it is scored: nothing, a scale, or scale and shift."""


@runtime_checkable
class Metric(Protocol):
    """What evaluation needs of a metric."""

    def update(self, prediction: NDArray[Any], target: NDArray[Any]) -> dict[str, float]:
        """Count one picture; return its own scores, or nothing where it has no known pixel."""
        ...

    def scores(self) -> dict[str, Any]:
        """The scores over everything counted so far, as JSON. Raises DataError if that is nothing."""
        ...


class SegmentationMetric:
    """Intersection over union from one confusion matrix over all pictures; `ignore` pixels are not counted.

    A mean is taken over the classes that occur in the ground truth: a class that no label shows has no IoU,
    and predicting it costs only the classes it displaces. `subsets` names means over some of the classes.
    """

    def __init__(
        self,
        classes: Sequence[str],
        *,
        ignore: int | None = IGNORE,
        subsets: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.classes, self.ignore = tuple(classes), ignore
        self.subsets = {
            name: [self.classes.index(member) for member in members]
            for name, members in (subsets or {}).items()
        }
        self.confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
        """[truth, prediction], in pixels."""
        self.samples = 0

    def update(
        self, prediction: Integer[np.ndarray, "H W"], target: Integer[np.ndarray, "H W"]
    ) -> dict[str, float]:
        """Class ids, both [H W]. The picture's own score is its mean IoU over the classes in its label."""
        known = np.ones(target.shape, dtype=bool) if self.ignore is None else target != self.ignore
        truth, guess = target[known].astype(np.int64), prediction[known].astype(np.int64)
        count = len(self.classes)
        for what, ids in (("label", truth), ("prediction", guess)):
            if ids.size and not 0 <= ids.min() <= ids.max() < count:
                raise DataError(
                    f"class ids of a {what} must lie in 0..{count - 1} or be {self.ignore}, "
                    f"got {ids.min()}..{ids.max()}; check the label set's classes"
                )
        matrix = np.bincount(truth * count + guess, minlength=count**2).reshape(count, count)
        self.confusion += matrix
        self.samples += 1
        return {"miou": _mean_iou(matrix)} if truth.size else {}

    def scores(self) -> dict[str, Any]:
        """miou, miou_<subset>, pixel_accuracy, and the IoU by class (None where no label shows it)."""
        if not self.confusion.any():
            raise DataError("mean IoU needs a labelled pixel; every label is void or none was given")
        iou, present = _iou(self.confusion)
        result: dict[str, Any] = {"miou": _mean_iou(self.confusion)}
        for name, members in self.subsets.items():
            shown = [iou[i] for i in members if present[i]]
            result[f"miou_{name}"] = float(np.mean(shown)) if shown else None
        result["pixel_accuracy"] = float(np.trace(self.confusion) / self.confusion.sum())
        result["iou"] = {name: float(iou[i]) if present[i] else None for i, name in enumerate(self.classes)}
        return {**result, "samples": self.samples}


def _iou(confusion: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """IoU of each class, and whether the ground truth shows it."""
    truth, guessed, hits = confusion.sum(axis=1), confusion.sum(axis=0), np.diag(confusion)
    return hits / np.maximum(truth + guessed - hits, 1), truth > 0


def _mean_iou(confusion: NDArray[np.int64]) -> float:
    iou, present = _iou(confusion)
    return float(iou[present].mean())


class SaliencyMetric:
    """S-measure (alpha 0.5), maximum F (beta^2 0.3) and MAE, all by pysodmetrics.

    A prediction is quantised to 0..255 and then stretched so that each picture's minimum is 0 and its maximum
    is 1, before all three, as the field's reference code does. F is the maximum over 256 thresholds of the
    curve that is averaged over pictures first. Ignored pixels count as rightly predicted background.
    """

    def __init__(self, *, ignore: int | None = IGNORE) -> None:
        # Loading it pulls in OpenCV and SciPy, half a second that only saliency should pay.
        from py_sod_metrics import MAE, FmeasureHandler, FmeasureV2, Smeasure

        self.ignore = ignore
        self._structure, self._error = Smeasure(alpha=0.5), MAE()
        handler = FmeasureHandler(with_dynamic=True, with_adaptive=False, beta=0.3)
        self._f = FmeasureV2(metric_handlers={"f": handler})
        self._curves = cast(list[NDArray[np.float64]], handler.dynamic_results)
        self.samples = 0

    def update(
        self, prediction: Float[np.ndarray, "H W"], target: Integer[np.ndarray, "H W"]
    ) -> dict[str, float]:
        """Probabilities in [0, 1] and a mask of 0, 1 or `ignore`, both [H W]. A mask of `ignore` alone does
        not count.
        """
        if not (prediction.min() >= 0 and prediction.max() <= 1):  # false for NaN, too
            raise DataError("a saliency prediction must be probabilities in [0, 1]; take the logits' sigmoid")
        if self.ignore is not None and (target == self.ignore).all():
            return {}
        quantised = np.round(prediction * 255).astype(np.uint8)
        truth = np.where(target == 1, 255, 0).astype(np.uint8)
        if self.ignore is not None:
            quantised[target == self.ignore] = 0
        for metric in (self._structure, self._error, self._f):
            metric.step(pred=quantised, gt=truth)
        self.samples += 1
        return {
            "s_measure": float(self._structure.sms[-1]),
            "max_f": float(self._curves[-1].max()),
            "mae": float(self._error.maes[-1]),
        }

    def scores(self) -> dict[str, Any]:
        """s_measure, max_f and mae over all pictures."""
        if not self.samples:
            raise DataError("the saliency metrics need a known pixel; every mask is void or none was given")
        return {
            "s_measure": float(np.mean(self._structure.sms)),
            "max_f": float(np.mean(self._curves, axis=0).max()),
            "mae": float(np.mean(self._error.maes)),
            "samples": self.samples,
        }


class DepthMetric:
    """AbsRel, RMSE, log10 and delta_1..3 of metric depth: of each picture first, then the mean over pictures.

    Pixels count where low < truth < high; predictions are clamped to that range (NaN counts as low), after
    they were aligned, if they are, on the same pixels. With a crop (top, bottom, left, right) only those rows
    and columns count. A picture without a valid pixel is left out of the mean and counted as skipped.
    """

    def __init__(
        self,
        valid_range: tuple[float, float],
        crop: tuple[int, int, int, int] | None = None,
        align: Alignment = "none",
    ) -> None:
        self.valid_range = valid_range
        self.align: Alignment = align
        top, bottom, left, right = crop or (None, None, None, None)
        self._window = slice(top, bottom), slice(left, right)
        self._rows: list[dict[str, float]] = []
        self.skipped = 0

    def update(
        self, prediction: Float[np.ndarray, "H W"], target: Float[np.ndarray, "H W"]
    ) -> dict[str, float]:
        """Depths in metres, both [H W]."""
        low, high = self.valid_range
        prediction, target = prediction[self._window], target[self._window]
        valid = (target > low) & (target < high)
        if not valid.any():
            self.skipped += 1
            return {}
        truth = target[valid].astype(np.float64)
        guess = np.nan_to_num(prediction[valid].astype(np.float64), nan=low, posinf=high, neginf=low)
        row = depth_errors(np.clip(aligned(guess, truth, self.align), low, high), truth)
        self._rows.append(row)
        return row

    def scores(self) -> dict[str, Any]:
        """abs_rel, rmse (metres), delta1, delta2, delta3, log10."""
        if not self._rows:
            raise DataError(f"depth metrics need a pixel whose depth lies in {self.valid_range} m; none does")
        means = {key: float(np.mean([row[key] for row in self._rows])) for key in self._rows[0]}
        return {**means, "samples": len(self._rows), "skipped": self.skipped}


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
