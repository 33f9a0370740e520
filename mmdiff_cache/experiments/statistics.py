"""Whether one run is better than another on the same test pictures: the paired bootstrap, and what it says.

Pictures are drawn with replacement, the same ones for both runs, and both are scored as evaluation scores a
whole split: from the sum of what the pictures add, not from scores of single pictures, whose mean is another
number for mIoU and maximum F. The interval is that of the percentiles. It tells how far the choice of test
pictures matters; how far the training's seed does, only several seeds tell (`verdict`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.metrics import LOWER_IS_BETTER
from mmdiff_cache.training.checkpoint import EMA
from mmdiff_cache.training.protocol import Way
from mmdiff_cache.training.statistics import PictureStatistics, read_statistics

DRAWS = 10_000
CONFIDENCE = 0.95
CHUNK = 1000
"""Draws that are scored at once; the result does not depend on it."""
DESCRIPTIVE = ("step", "scores")
"""Fields of `About` in which runs that are compared may differ."""

Verdict = Literal["confirmed", "refuted", "open"]
Score = Callable[[Float64[np.ndarray, "D K"]], Float64[np.ndarray, " D"]]
"""From D sums of statistics to a score of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """By how much one run is better than another: positive where it is, whichever way its score runs."""

    estimate: float
    """Of all test pictures, as they are."""
    low: float
    high: float
    """Ends of the 95 % interval."""

    def __str__(self) -> str:
        return f"{self.estimate:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired_difference(
    better: str | Path,
    worse: str | Path,
    task: str,
    metric: str,
    draws: int = DRAWS,
    seed: int = 0,
    *,
    beyond: tuple[str | Path, str | Path] | None = None,
    split: str = "test",
    weights: str = EMA,
) -> Difference:
    """What the run that is claimed to be better gains over the other, with its 95 % interval.

    With `beyond`, a better and a worse run too, by how much that gain is larger than theirs. All are folders
    of runs that were scored on the split; `metric` is a score by its name in an evaluation, such as
    `miou_shapes` or `iou.ball`. Raises ConfigError for a run that was not scored, for runs that were not
    scored on the same pictures in the same way, and for a score that there is not; DataError where it has no
    value.
    """
    way = Way(split=split, weights=weights, align="none", flip=False)
    runs = (better, worse) if beyond is None else (better, worse, *reversed(beyond))
    first, *others = (read_statistics(run, task, way) for run in runs)
    for other in others:
        check_comparable(first, other)
    known = first.about.scores
    if metric not in known:
        raise ConfigError(f"{task} has no score {metric!r}; there are {', '.join(known)}")
    measure = first.about.metric()
    found = contrast(
        [first.values, *(other.values for other in others)],
        lambda sums: measure.scores_of(sums)[metric],
        draws=draws,
        seed=seed,
    )
    return reversed_sign(found) if metric in LOWER_IS_BETTER else found


def difference(
    one: Float64[np.ndarray, "n K"],
    other: Float64[np.ndarray, "n K"],
    score: Score,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """The score of one minus that of the other, over the same n pictures in the same order (`contrast`)."""
    return contrast([one, other], score, draws=draws, seed=seed)


def contrast(
    runs: Sequence[Float64[np.ndarray, "n K"]], score: Score, *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Scores of runs, over the same n pictures in the same order, with the signs + - + - of their places.

    Draws in which a score has no value (none of the pictures shows its classes) are left out. Raises
    DataError where all pictures together give none.
    """
    signs = (1 - 2 * (number % 2) for number in range(len(runs)))
    signed = list(zip(signs, runs, strict=False))
    estimate = sum(sign * score(run.sum(axis=0)[None]).item() for sign, run in signed)
    if np.isnan(estimate):
        raise DataError("a difference needs a score that has a value; no test picture shows what it is of")
    found = np.concatenate(
        [
            np.sum([sign * score(times @ run) for sign, run in signed], axis=0)
            for times in _drawn(len(runs[0]), draws, seed)
        ]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(found, [tail, 1 - tail])
    return Difference(estimate=estimate, low=float(low), high=float(high))


def _drawn(pictures: int, draws: int, seed: int) -> Iterator[Float64[np.ndarray, "D n"]]:
    """How often each picture is in each draw of as many pictures as there are."""
    generator = np.random.default_rng(seed)
    shares = np.full(pictures, 1 / pictures)
    for start in range(0, draws, CHUNK):
        times: Int64[np.ndarray, "D n"] = generator.multinomial(
            pictures, shares, size=min(CHUNK, draws - start)
        )
        yield times.astype(np.float64)


def reversed_sign(found: Difference) -> Difference:
    """The same, the other way round: of an error less is better."""
    return Difference(estimate=-found.estimate, low=-found.high, high=-found.low)


def verdict(differences: Sequence[Difference]) -> Verdict:
    """What the differences of all seeds say of a claim.

    Confirmed: in every seed the interval lies above zero; refuted: in every seed below; else open.
    """
    if differences and all(one.low > 0 for one in differences):
        return "confirmed"
    if differences and all(one.high < 0 for one in differences):
        return "refuted"
    return "open"


def check_comparable(one: PictureStatistics, other: PictureStatistics) -> None:
    """Raise ConfigError for runs that were not scored on the same pictures in the same way."""
    for field in fields(one.about):
        mine, theirs = getattr(one.about, field.name), getattr(other.about, field.name)
        if field.name not in DESCRIPTIVE and mine != theirs:
            raise ConfigError(
                f"runs are compared picture by picture only when they are scored alike; {field.name} is "
                f"{mine!r} of one and {theirs!r} of the other: evaluate both in the same way"
            )
    pairs = zip(
        zip(one.sample_ids, one.contents, strict=True),
        zip(other.sample_ids, other.contents, strict=True),
        strict=False,
    )
    odd = next((mine[0] for mine, theirs in pairs if mine != theirs), None)
    if odd is not None or len(one.sample_ids) != len(other.sample_ids):
        where = "their number" if odd is None else f"picture {odd} or its label"
        raise ConfigError(
            f"runs are compared on the same test pictures, but {where} differs "
            f"({len(one.sample_ids)} and {len(other.sample_ids)} pictures); use stores of the same data"
        )
