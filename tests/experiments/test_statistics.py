"""The paired bootstrap against a slow direct one, a case by hand, and differences that are known."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.experiments import statistics
from mmdiff_cache.experiments.statistics import Difference, difference, paired_difference, verdict
from mmdiff_cache.metrics import DepthMetric, Metric, SaliencyMetric, SegmentationMetric
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.training.statistics import About, PictureStatistics, write_statistics

CLASSES = ("sky", "ball", "box")
SEGMENTATION = About(
    task="segmentation",
    label=LabelSpec(name="segmentation", kind="classes", classes=CLASSES, ignore=255),
    data_set="blocks",
    split="test",
    weights="ema",
    align="none",
    flip=False,
    protocol="4 samples of test",
    step=12,
    scores=("miou", "iou.ball"),
)
DEPTH = replace(
    SEGMENTATION,
    task="depth",
    label=LabelSpec(name="depth", kind="depth", valid_range=(0.1, 10.0)),
    scores=("abs_rel", "delta1"),
)


def kept(folder: Path, about: About, values: NDArray[np.float64], **changes: Any) -> Path:
    """A run's folder with the statistics of some pictures."""
    names = tuple(f"blocks-test-{n:06d}" for n in range(len(values)))
    found = PictureStatistics(about=about, sample_ids=names, contents=names, values=values)
    folder.mkdir()
    write_statistics(folder, replace(found, **changes))
    return folder


def mean_of_first(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[:, 0] / sums[:, 1]


def test_two_pictures_by_hand() -> None:
    """Differences 1 and 3: the draws' means are 1, 2, 2 and 3 with a quarter each; 95 % reach both ends."""
    one, other = np.array([[2.0, 1], [5.0, 1]]), np.array([[1.0, 1], [2.0, 1]])
    assert difference(one, other, mean_of_first) == Difference(estimate=2.0, low=1.0, high=3.0)
    alike = difference(one, one, mean_of_first)
    assert (alike.estimate, alike.low, alike.high) == (0, 0, 0)


def test_iou_is_of_the_drawn_pictures_together(tmp_path: Path) -> None:
    """Two pictures with one class beside sky, by hand. The whole: IoU of ball (6 + 0) / (10 + 4) to 4 / 14.

    A draw of the first twice has 6 / 10 to 4 / 10; of the second twice 0 / 4 to 0 / 4. Half of the draws are
    one of these, so the interval goes from 0 to 0.2.
    """

    def row(truth: int, guess: int, hits: int) -> list[float]:
        sky = 20.0
        return [sky, truth, 0, sky, guess, 0, sky, hits, 0, 1]

    better = np.array([row(8, 8, 6), row(4, 0, 0)])
    worse = np.array([row(8, 6, 4), row(4, 0, 0)])
    found = paired_difference(
        kept(tmp_path / "a", SEGMENTATION, better), kept(tmp_path / "b", SEGMENTATION, worse),
        "segmentation", "iou.ball",
    )  # fmt: skip
    assert found.estimate == pytest.approx(6 / 14 - 4 / 14)
    assert (found.low, found.high) == (pytest.approx(0), pytest.approx(0.2))


def pictures(kind: str) -> tuple[Callable[[], Metric], str, list[list[tuple[NDArray, NDArray]]]]:
    """A metric, a score, and for two runs the predictions and truths of a dozen pictures."""
    rng = np.random.default_rng(5)
    runs: list[list[tuple[NDArray, NDArray]]] = [[], []]
    for _ in range(12):
        ids, metres = rng.integers(0, 3, (6, 6)), rng.uniform(1, 8, (6, 6))
        for number, run in enumerate(runs):
            if kind == "segmentation":
                wrong = rng.random((6, 6)) < 0.3 + 0.1 * number
                run.append((np.where(wrong, rng.integers(0, 3, (6, 6)), ids), ids))
            elif kind == "saliency":
                noise = rng.random((6, 6)) * (0.5 + 0.2 * number)
                run.append(((0.5 * (ids == 1) + 0.7 * noise).clip(0, 1), (ids == 1).astype(int)))
            else:
                run.append((metres * rng.uniform(0.7, 1.4 + 0.1 * number, (6, 6)), metres))
    made: dict[str, tuple[Callable[[], Metric], str]] = {
        "segmentation": (lambda: SegmentationMetric(CLASSES), "miou"),
        "saliency": (SaliencyMetric, "max_f"),
        "depth": (lambda: DepthMetric((0.1, 10.0)), "abs_rel"),
    }
    return (*made[kind], runs)


@pytest.mark.parametrize("kind", ["segmentation", "saliency", "depth"])
def test_it_is_the_direct_bootstrap(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draw scored anew from the predictions of its pictures, one after the other."""
    make, name, runs = pictures(kind)
    direct = []
    times = np.random.default_rng(3).multinomial(12, [1 / 12] * 12, size=30)
    for draw in [np.ones(12, int), *times]:
        scores = []
        for run in runs:
            metric = make()
            for picture, count in zip(run, draw, strict=True):
                for _ in range(count):
                    metric.update(*picture)
            scores.append(metric.scores()[name])
        direct.append(scores[0] - scores[1])
    tables = [np.stack([make().statistics(*picture) for picture in run]) for run in runs]
    monkeypatch.setattr(statistics, "CHUNK", 7)
    found = difference(*tables, lambda sums: make().scores_of(sums)[name], draws=30, seed=3)
    assert found.estimate == pytest.approx(direct[0], rel=1e-9)
    assert [found.low, found.high] == pytest.approx(np.quantile(direct[1:], [0.025, 0.975]), rel=1e-9)


def test_the_interval_holds_a_known_difference_as_often_as_it_says() -> None:
    """400 pairs of runs on 60 pictures whose errors share what is hard about a picture; true difference 0.3.

    The pictures' own spread (2) would drown it unpaired. 95 % of 400 are 380, with a deviation of 4.4.
    """
    rng, inside, unpaired = np.random.default_rng(11), 0, 0
    for trial in range(400):
        hard = rng.normal(0, 2, 60)
        one, other = (
            np.stack([shift + hard + rng.normal(0, 0.5, 60), np.ones(60)], axis=1) for shift in (1.3, 1.0)
        )
        found = difference(one, other, mean_of_first, draws=400, seed=trial)
        inside += found.low <= 0.3 <= found.high
        unpaired += found.high - found.low > 1
    assert 360 <= inside <= 395
    assert unpaired == 0


def test_ten_thousand_draws_of_five_hundred_pictures_take_about_a_second() -> None:
    """Of a saliency run's 259 numbers a picture; the bound leaves room for a busy machine."""
    rng = np.random.default_rng(0)
    one, other = (np.concatenate([rng.random((500, 258)), np.ones((500, 1))], axis=1) for _ in range(2))
    start = time.process_time()
    difference(one, other, lambda sums: SaliencyMetric().scores_of(sums)["max_f"])
    assert time.process_time() - start < 8


def test_an_error_that_is_lower_is_a_gain(tmp_path: Path) -> None:
    rows = np.tile([0.2, 1, 0.5, 1, 1, 0.1, 1.0, 0.0], (5, 1))
    lower = rows - [0.1, 0, 0.2, 0, 0, 0, 0, 0]
    a, b = kept(tmp_path / "a", DEPTH, lower), kept(tmp_path / "b", DEPTH, rows)
    assert paired_difference(a, b, "depth", "abs_rel").estimate == pytest.approx(0.1)
    share = paired_difference(a, b, "depth", "delta1")
    assert (share.estimate, share.low, share.high) == pytest.approx((-0.2, -0.2, -0.2))
    assert paired_difference(b, a, "depth", "delta1").low == pytest.approx(0.2)


def test_draws_without_a_class_are_left_out_and_no_class_at_all_is_refused() -> None:
    metric = SegmentationMetric(CLASSES)
    rows = np.stack([metric.statistics(np.full((1, 2), n), np.full((1, 2), n)) for n in (0, 0, 0, 1)])
    found = difference(rows, rows, lambda sums: metric.scores_of(sums)["iou.ball"], draws=50)
    assert (found.low, found.high) == (0, 0)
    with pytest.raises(DataError, match="no test picture shows"):
        difference(rows, rows, lambda sums: metric.scores_of(sums)["iou.box"], draws=50)


def test_seed_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    one, other = (np.stack([rng.random(20), np.ones(20)], axis=1) for _ in range(2))
    found = difference(one, other, mean_of_first, draws=100)
    assert found == difference(one, other, mean_of_first, draws=100)
    assert found != difference(one, other, mean_of_first, draws=100, seed=1)
    monkeypatch.setattr(statistics, "CHUNK", 9)
    cut = difference(one, other, mean_of_first, draws=100)
    assert (found.low, found.high) == pytest.approx((cut.low, cut.high), rel=1e-12)


@pytest.mark.parametrize(
    ("about", "changes", "match"),
    [
        ({"protocol": "5 samples of test (1 failed sample(s) left out)"}, {}, "protocol is"),
        ({"label": replace(DEPTH.label, crop=(0, 1, 0, 1))}, {}, "label is"),
        ({"data_set": "scenes"}, {}, "data_set is"),
        ({}, {"sample_ids": tuple("abcde")}, "picture blocks-test-000000 or its label differs"),
        ({}, {"contents": tuple("abcde")}, "picture blocks-test-000000 or its label differs"),
    ],
)
def test_what_was_scored_otherwise_is_refused(
    tmp_path: Path, about: dict[str, Any], changes: dict[str, Any], match: str
) -> None:
    values = np.ones((5, 8))
    a = kept(tmp_path / "a", DEPTH, values)
    b = kept(tmp_path / "b", replace(DEPTH, **about), values, **changes)
    with pytest.raises(ConfigError, match=match):
        paired_difference(a, b, "depth", "abs_rel")


def test_other_weights_numbers_of_pictures_and_scores_are_refused(tmp_path: Path) -> None:
    a, b = kept(tmp_path / "a", DEPTH, np.ones((5, 8))), kept(tmp_path / "b", DEPTH, np.ones((4, 8)))
    raw = kept(tmp_path / "raw", replace(DEPTH, weights="raw"), np.ones((5, 8)))
    (raw / "statistics-depth-test-raw.npz").rename(raw / "statistics-depth-test-ema.npz")
    with pytest.raises(ConfigError, match=r"number differs \(5 and 4 pictures\)"):
        paired_difference(a, b, "depth", "abs_rel")
    with pytest.raises(ConfigError, match="weights is 'ema' of one and 'raw' of the other"):
        paired_difference(a, raw, "depth", "abs_rel")
    with pytest.raises(ConfigError, match="no score 'miou'; there are abs_rel, delta1"):
        paired_difference(a, a, "depth", "miou")


def test_a_longer_training_may_be_compared(tmp_path: Path) -> None:
    a = kept(tmp_path / "a", DEPTH, np.ones((5, 8)))
    b = kept(tmp_path / "b", replace(DEPTH, step=24), np.ones((5, 8)))
    assert paired_difference(a, b, "depth", "abs_rel").estimate == 0


def test_verdicts_need_every_seed() -> None:
    up, down, both = (
        Difference(estimate=(low + high) / 2, low=low, high=high)
        for low, high in ((0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3))
    )
    assert verdict([up, up, up]) == "confirmed"
    assert verdict([down, down]) == "refuted"
    for mixed in ([up, up, both], [up, down], [both], []):
        assert verdict(mixed) == "open"
    touching = Difference(estimate=0.1, low=0.0, high=0.2)
    assert verdict([up, touching]) == "open"
