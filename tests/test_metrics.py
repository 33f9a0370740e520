"""Metrics against hand-computed cases, pysodmetrics and torchmetrics."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmdiff_cache.errors import DataError
from mmdiff_cache.metrics import DepthMetric, Metric, SaliencyMetric, SegmentationMetric

CLASSES = ("sky", "ground", "ball", "box")


def class_maps(seed: int, count: int, side: int = 12) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of prediction and target; a tenth of the target is void."""
    rng = np.random.default_rng(seed)
    pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for _ in range(count):
        target = rng.integers(0, 4, (side, side))
        prediction = np.where(rng.random((side, side)) < 0.6, target, rng.integers(0, 4, (side, side)))
        target[rng.random((side, side)) < 0.1] = 255
        pairs.append((prediction, target))
    return pairs


# --- segmentation ---


def test_miou_by_hand() -> None:
    """IoU: sky 1/2, ground 1/3; ball is shown nowhere, so a wrong ball costs only the ground it displaces."""
    metric = SegmentationMetric(CLASSES)
    own = metric.update(np.array([[0, 1, 1, 2, 3]]), np.array([[0, 0, 1, 1, 255]]))
    scores = metric.scores()
    assert scores["iou"] == {"sky": 1 / 2, "ground": 1 / 3, "ball": None, "box": None}
    assert scores["miou"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert scores["pixel_accuracy"] == pytest.approx(2 / 4)
    assert own == {"miou": scores["miou"]}


def test_miou_is_of_one_confusion_matrix_not_a_mean_over_pictures() -> None:
    metric = SegmentationMetric(("a", "b"))
    metric.update(np.zeros((1, 8), int), np.zeros((1, 8), int))
    metric.update(np.array([[0, 1]]), np.array([[1, 1]]))
    assert metric.scores()["iou"] == {"a": pytest.approx(8 / 9), "b": pytest.approx(1 / 2)}


def test_subset_is_the_mean_over_its_classes_that_occur() -> None:
    metric = SegmentationMetric(CLASSES, subsets={"shapes": ("ball", "box"), "sky": ("sky",)})
    metric.update(np.array([[3, 3, 1]]), np.array([[3, 1, 1]]))
    scores = metric.scores()
    assert scores["miou_shapes"] == pytest.approx(1 / 2)
    assert scores["miou_sky"] is None
    assert scores["miou"] == pytest.approx((1 / 2 + 1 / 2) / 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_iou_equals_torchmetrics() -> None:
    import torch
    from torchmetrics.classification import MulticlassJaccardIndex

    ours, theirs = (
        SegmentationMetric(CLASSES),
        MulticlassJaccardIndex(num_classes=4, average="none", ignore_index=255),
    )
    for prediction, target in class_maps(0, 5):
        ours.update(prediction, target)
        theirs.update(torch.from_numpy(prediction), torch.from_numpy(target))
    expected = theirs.compute().numpy()
    np.testing.assert_allclose(list(ours.scores()["iou"].values()), expected, rtol=1e-6)
    assert ours.scores()["miou"] == pytest.approx(expected.mean(), rel=1e-6)


def test_a_class_that_no_label_shows_has_no_iou_where_torchmetrics_counts_a_zero() -> None:
    import torch
    from torchmetrics.classification import MulticlassJaccardIndex

    target = np.array([[0, 0, 1, 255], [0, 1, 1, 255]])
    prediction = np.array([[0, 3, 1, 3], [0, 1, 0, 2]])
    ours = SegmentationMetric(CLASSES)
    ours.update(prediction, target)
    theirs = MulticlassJaccardIndex(num_classes=4, average="none", ignore_index=255)
    expected = theirs(torch.from_numpy(prediction), torch.from_numpy(target)).numpy()
    iou = list(ours.scores()["iou"].values())
    np.testing.assert_allclose(iou[:2], [2 / 4, 2 / 3])
    np.testing.assert_allclose(expected, [*iou[:2], 0, 0], rtol=1e-6)
    assert iou[2:] == [None, None]
    assert ours.scores()["miou"] == pytest.approx((2 / 4 + 2 / 3) / 2)


@given(st.integers(0, 2**16), st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_order_and_cutting_do_not_matter(seed: int, count: int) -> None:
    pairs = class_maps(seed, count, side=4)
    whole, shuffled, stacked = (SegmentationMetric(CLASSES) for _ in range(3))
    for pair in pairs:
        whole.update(*pair)
    for pair in reversed(pairs):
        shuffled.update(*pair)
    stacked.update(np.concatenate([p for p, _ in pairs]), np.concatenate([t for _, t in pairs]))
    assert whole.scores() == shuffled.scores()
    assert whole.scores()["iou"] == stacked.scores()["iou"]


def test_perfect_and_void_only() -> None:
    metric = SegmentationMetric(CLASSES)
    assert metric.update(np.zeros((2, 2), int), np.full((2, 2), 255)) == {}
    with pytest.raises(DataError, match="labelled pixel"):
        metric.scores()
    metric.update(np.array([[0, 3]]), np.array([[0, 3]]))
    assert metric.scores()["miou"] == 1.0


@pytest.mark.parametrize(("prediction", "target"), [(4, 0), (0, 4), (-1, 0), (0, -3)])
def test_class_ids_out_of_range_are_named(prediction: int, target: int) -> None:
    with pytest.raises(DataError, match=r"must lie in 0\.\.3"):
        SegmentationMetric(CLASSES).update(np.array([[prediction]]), np.array([[target]]))


def test_without_an_ignored_id_all_pixels_count() -> None:
    metric = SegmentationMetric(("a", "b"), ignore=None)
    metric.update(np.array([[0, 1]]), np.array([[0, 0]]))
    assert metric.scores()["miou"] == pytest.approx(1 / 2)
    with pytest.raises(DataError, match="class ids"):
        metric.update(np.array([[0]]), np.array([[255]]))


# --- saliency ---


def saliency_maps(count: int) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    rng = np.random.default_rng(1)
    pairs: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = []
    for _ in range(count):
        mask = np.zeros((24, 32), dtype=np.int64)
        y, x = rng.integers(0, 12, 2)
        mask[y : y + 9, x : x + 11] = 1
        noise = rng.random(mask.shape, dtype=np.float32)
        # Each picture has its best threshold elsewhere.
        pairs.append((((0.4 * mask + 0.55 * noise) ** (0.3 + len(pairs))).astype(np.float32), mask))
    return pairs


def test_saliency_equals_pysodmetrics_from_saved_pictures() -> None:
    """The way papers do it: 8-bit pictures of prediction and mask, one step each, then the summary."""
    from py_sod_metrics import MAE, FmeasureHandler, FmeasureV2, Smeasure

    ours, structure, error = SaliencyMetric(), Smeasure(), MAE()
    f = FmeasureV2({"f": FmeasureHandler(with_dynamic=True, with_adaptive=False)})
    for prediction, mask in saliency_maps(4):
        ours.update(prediction, mask)
        for metric in (structure, error, f):
            metric.step(np.round(prediction * 255).astype(np.uint8), (mask * 255).astype(np.uint8))
    scores = ours.scores()
    assert scores["s_measure"] == pytest.approx(structure.get_results()["sm"])
    assert scores["mae"] == pytest.approx(error.get_results()["mae"])
    assert scores["max_f"] == pytest.approx(f.get_results()["f"]["dynamic"].max())


def f_curve(prediction: NDArray[np.float32], mask: NDArray[np.int64]) -> NDArray[np.float64]:
    """F at 256 thresholds from its definition, beta^2 = 0.3, on the stretched 8-bit picture."""
    levels = np.round(prediction * 255)
    stretched = ((levels - levels.min()) / (levels.max() - levels.min()) * 255).astype(np.uint8)
    curve: list[float] = []
    for threshold in range(255, -1, -1):
        shown = stretched >= threshold
        hits = float(np.sum(shown & (mask == 1)))
        precision, recall = hits / max(shown.sum(), 1), hits / mask.sum()
        curve.append(1.3 * precision * recall / (0.3 * precision + recall) if hits else 0.0)
    return np.array(curve)


def test_max_f_and_mae_by_their_definitions() -> None:
    """The maximum is of the mean curve; the mean of the pictures' maxima would be higher."""
    metric, pairs = SaliencyMetric(), saliency_maps(3)
    own = [metric.update(prediction, mask)["max_f"] for prediction, mask in pairs]
    curves = np.stack([f_curve(prediction, mask) for prediction, mask in pairs])
    assert metric.scores()["max_f"] == pytest.approx(curves.mean(axis=0).max(), rel=1e-6)
    np.testing.assert_allclose(own, curves.max(axis=1), rtol=1e-6)
    assert metric.scores()["max_f"] < np.mean(own) - 0.01
    errors: list[float] = []
    for prediction, mask in pairs:
        levels = np.round(prediction * 255) / 255
        errors.append(float(np.abs((levels - levels.min()) / np.ptp(levels) - mask).mean()))
    assert metric.scores()["mae"] == pytest.approx(np.mean(errors))


def test_perfect_saliency() -> None:
    metric, mask = SaliencyMetric(), saliency_maps(1)[0][1]
    own = metric.update(mask.astype(np.float32), mask)
    assert own["mae"] == 0.0
    assert own["max_f"] == pytest.approx(1.0)
    assert own["s_measure"] == pytest.approx(1.0, abs=1e-2)


def test_ignored_pixels_cannot_hurt() -> None:
    prediction, mask = saliency_maps(1)[0]
    prediction[0, 0], prediction[:, -3:] = 0.0, 0.0
    expected = SaliencyMetric().update(prediction, np.where(np.arange(32) < 29, mask, 0))
    void, wild = mask.copy(), prediction.copy()
    void[:, -3:], wild[:, -3:] = 255, 1.0
    assert SaliencyMetric().update(wild, void) == expected


def test_a_void_mask_does_not_count() -> None:
    """As rightly predicted background it would be a perfect score."""
    metric, (prediction, mask) = SaliencyMetric(), saliency_maps(1)[0]
    assert metric.update(prediction, np.full_like(mask, 255)) == {}
    with pytest.raises(DataError, match="known pixel"):
        metric.scores()
    own = metric.update(prediction, mask)
    assert metric.scores() == {**own, "samples": 1}


@pytest.mark.parametrize("value", [-0.1, 1.5, np.nan])
def test_saliency_wants_probabilities(value: float) -> None:
    with pytest.raises(DataError, match="sigmoid"):
        SaliencyMetric().update(np.full((4, 4), value, np.float32), np.zeros((4, 4), np.int64))


def test_the_module_loads_neither_opencv_nor_scipy_nor_torch() -> None:
    code = (
        "import sys, mmdiff_cache.metrics;"
        "print([m for m in ('cv2', 'scipy', 'torch', 'zarr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- depth ---


def test_depth_by_hand() -> None:
    """Ratios 1, 1.2, 1.5 and 2: delta1 counts two, delta2 (1.5625) three, delta3 (1.953) three."""
    metric = DepthMetric((0.1, 10.0))
    truth = np.array([[2.0, 2.0, 2.0, 2.0, 0.0]])
    own = metric.update(np.array([[2.0, 2.4, 3.0, 1.0, 9.0]]), truth)
    assert own["abs_rel"] == pytest.approx((0 + 0.2 + 0.5 + 0.5) / 4)
    assert own["rmse"] == pytest.approx(np.sqrt((0 + 0.16 + 1 + 1) / 4))
    assert (own["delta1"], own["delta2"], own["delta3"]) == (2 / 4, 3 / 4, 3 / 4)
    assert own["log10"] == pytest.approx(np.log10([1.2, 1.5, 2.0]).sum() / 4)


def test_depth_is_a_mean_over_pictures_not_over_pixels() -> None:
    metric = DepthMetric((0.1, 10.0))
    metric.update(np.full((10, 10), 2.0), np.full((10, 10), 2.0))
    metric.update(np.full((1, 1), 3.0), np.full((1, 1), 2.0))
    assert metric.scores()["abs_rel"] == pytest.approx(0.25)
    assert metric.scores()["rmse"] == pytest.approx(0.5)


def test_the_median_scales_each_picture_by_its_valid_pixels() -> None:
    """Medians of the three valid pixels are 4 and 1: times 4. What is invalid or cropped off has no say."""
    metric = DepthMetric((0.1, 10.0), crop=(0, 1, 0, 4), align="median")
    own = metric.update(np.array([[0.5, 1.0, 2.0, 900.0, 900.0]]), np.array([[2.0, 4.0, 9.0, 0.0, 5.0]]))
    assert own["abs_rel"] == pytest.approx((0 + 0 + 1 / 9) / 3)
    metric.update(np.array([[30.0]]), np.array([[3.0]]))
    assert metric.scores()["abs_rel"] == pytest.approx((1 / 27 + 0) / 2)


def test_least_squares_find_scale_and_shift_of_each_picture() -> None:
    metric, guess = DepthMetric((0.1, 10.0), align="lstsq"), np.array([[1.0, 2.0, 3.0, 4.0, 77.0]])
    assert metric.update(guess, np.array([[1.5, 3.5, 5.5, 7.5, 0.0]]))["rmse"] == pytest.approx(0, abs=1e-9)
    assert metric.update(-guess, np.array([[7.0, 6.0, 5.0, 4.0, 0.0]]))["rmse"] == pytest.approx(0, abs=1e-9)
    # By hand: through (1, 1), (2, 3), (3, 2) goes 1 + x / 2, off by -0.5, 1, -0.5.
    own = metric.update(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 3.0, 2.0]]))
    assert own["rmse"] == pytest.approx(np.sqrt((0.25 + 1 + 0.25) / 3))


def test_aligned_depths_are_clamped_afterwards() -> None:
    """The last becomes 2000 m, which counts as 10; clamped before as well it would have been 20."""
    own = DepthMetric((0.1, 10.0), align="median").update(
        np.array([[1.0, 1.0, 1000.0]]), np.array([[2.0, 2.0, 8.0]])
    )
    assert own["abs_rel"] == pytest.approx((10 - 8) / 8 / 3)


@pytest.mark.parametrize("align", ["median", "lstsq"])
def test_a_constant_prediction_can_be_aligned(align: Literal["median", "lstsq"]) -> None:
    metric, truth = DepthMetric((0.1, 10.0), align=align), np.array([[2.0, 4.0]])
    for value in (0.0, 5.0):
        assert np.isfinite(list(metric.update(np.full((1, 2), value), truth).values())).all()
    assert metric.update(np.full((1, 2), 5.0), truth)["rmse"] == pytest.approx(1.0)


def test_predictions_are_clamped_to_the_valid_range() -> None:
    low, high = 0.5, 10.0
    wild = np.array([[np.nan, np.inf, -np.inf, 0.0, 1e9]])
    tame = np.array([[low, high, low, low, high]])
    truth = np.full((1, 5), 4.0)
    assert DepthMetric((low, high)).update(wild, truth) == DepthMetric((low, high)).update(tame, truth)


def test_depth_outside_the_range_and_empty_pictures_are_left_out() -> None:
    metric = DepthMetric((0.1, 10.0))
    assert metric.update(np.ones((2, 2)), np.array([[0.0, 0.1], [10.0, np.nan]])) == {}
    with pytest.raises(DataError, match="none does"):
        metric.scores()
    metric.update(np.ones((1, 1)), np.ones((1, 1)))
    assert (metric.scores()["samples"], metric.scores()["skipped"]) == (1, 1)
    assert metric.scores()["delta1"] == 1.0


def test_scores_are_plain_json() -> None:
    metrics: list[tuple[Metric, NDArray[np.generic], NDArray[np.generic]]] = [
        (SegmentationMetric(CLASSES, subsets={"x": ("box",)}), *class_maps(3, 1)[0]),
        (SaliencyMetric(), *saliency_maps(1)[0]),
        (DepthMetric((0.1, 10.0)), np.ones((2, 2), np.float32), np.ones((2, 2), np.float32)),
    ]
    for metric, prediction, target in metrics:
        own = metric.update(prediction, target)
        assert json.loads(json.dumps(own)) == own
        assert json.loads(json.dumps(metric.scores())) == metric.scores()


# --- statistics ---

SEVERAL: dict[str, Callable[[], tuple[Metric, list[tuple[NDArray[Any], NDArray[Any]]]]]] = {
    "segmentation": lambda: (SegmentationMetric(CLASSES, subsets={"x": ("box",)}), class_maps(4, 4)),
    "saliency": lambda: (SaliencyMetric(), list(saliency_maps(4))),
    "depth": lambda: (
        DepthMetric((0.1, 10.0)),
        [(np.full((2, 2), 1.0 + n), np.array([[2.0, 3.0], [n, 5.0]])) for n in range(3)]
        + [(np.ones((2, 2)), np.zeros((2, 2)))],  # nothing to score
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_weights_of_statistics_are_repeated_pictures(kind: str) -> None:
    """Weight 2 is a picture counted twice, weight 0 one left out, and weights 1 are the scores as ever."""
    metric, pairs = SEVERAL[kind]()
    table = np.stack([metric.statistics(*pair) for pair in pairs])
    for pair in pairs:
        metric.update(*pair)
    assert json.dumps(metric.scores()) == json.dumps(_from(SEVERAL[kind]()[0], table))
    for weights in ((2, 0, 1, 0), (0, 1, 1, 3)):
        repeated = SEVERAL[kind]()[0]
        for pair in (pair for pair, weight in zip(pairs, weights, strict=True) for _ in range(weight)):
            repeated.update(*pair)
        found = repeated.scores_of((np.array(weights, float) @ table)[None])
        for name, value in repeated.scores_of(repeated.sums[None]).items():
            np.testing.assert_allclose(found[name], value, rtol=1e-12)


def _from(metric: Metric, table: NDArray[np.float64]) -> dict[str, Any]:
    for row in table:
        metric.add(row)
    return metric.scores()


@pytest.mark.parametrize("kind", SEVERAL)
def test_many_sums_are_scored_at_once(kind: str) -> None:
    metric, pairs = SEVERAL[kind]()
    sums = np.cumsum([metric.statistics(*pair) for pair in pairs], axis=0)
    together = metric.scores_of(sums)
    for number, one in enumerate(sums):
        for name, value in metric.scores_of(one[None]).items():
            np.testing.assert_array_equal(together[name][number], value[0])
