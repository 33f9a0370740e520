"""How a row's held-out score ran while it trained: whether its steps were enough."""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from statistics import mean

from mmdiff_cache.training.checkpoint import EMA
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.run import load_run

LATE = 0.8
"""From this share of the steps on a curve should be flat."""

Curve = tuple[tuple[int, float], ...]
"""Step, and the score of the averaged weights on the held-out samples."""


def held_out_curve(folders: Iterable[Path], task: str, score: str) -> Curve:
    """The mean over trainings that checked at the same steps; empty where nothing was held out.

    Of a step that was checked twice, after a restart, the later check counts.
    """
    points = [point for folder in folders for point in _of_one(folder, task, score).items()]
    return tuple(
        (step, mean(value for _, value in found))
        for step, found in groupby(sorted(points), key=lambda point: point[0])
    )


def _of_one(folder: Path, task: str, score: str) -> dict[int, float]:
    several = len(load_run(folder).tasks) > 1
    checks = {line["step"]: line["held_out"][EMA] for line in read_metrics(folder) if "held_out" in line}
    scores = {step: found[task] if several else found for step, found in checks.items()}
    return {step: found[score] for step, found in scores.items() if score in found}


def late_change(curve: Curve) -> float | None:
    """By how much the score still changed in the last fifth of the steps; None where nothing tells."""
    before = [value for step, value in curve if step <= LATE * curve[-1][0]]
    return curve[-1][1] - before[-1] if before else None
