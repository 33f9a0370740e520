"""What came of a row on a task: its scores over seeds, or why it was not run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff_cache.experiments.curves import Curve
from mmdiff_cache.experiments.table import METRICS
from mmdiff_cache.sweeps.results import SCORES, numbers
from mmdiff_cache.sweeps.table import Spread, spread
from mmdiff_cache.tasks import find_task, headline
from mmdiff_cache.training.checkpoint import EMA
from mmdiff_cache.training.run import load_run


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A row on a task."""

    row: str
    task: str
    dataset: str
    """The data set that it is scored on."""
    split: str | None
    """On which it is scored; None where nothing was trained."""
    paper: Mapping[str, float]
    runs: Mapping[int, Path]
    """Folder of each seed's training."""
    scores: Mapping[str, Spread]
    """By metric as in the paper; empty where it was not run."""
    parameters: int | None
    """Trained ones; None where it was not run."""
    curve: Curve
    """The first of its metrics on the held-out samples, step by step; empty where nothing was held out."""
    expected: bool
    """Whether the plan had all that it takes."""
    reason: str | None
    """Why it was not run, or not by every seed."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "row": self.row,
            "task": self.task,
            "dataset": self.dataset,
            "split": self.split,
            "paper": dict(self.paper),
            "runs": {str(seed): str(folder) for seed, folder in self.runs.items()},
            "scores": {
                name: {"mean": one.mean, "deviation": one.deviation, "seeds": one.seeds}
                for name, one in self.scores.items()
            },
            "parameters": self.parameters,
            "held_out": [list(point) for point in self.curve],
            "reason": self.reason,
        }


def test_scores(folder: Path, task: str, split: str) -> dict[str, float] | None:
    """What the sweep or `evaluate` found of a task of a run on a split; None where it was not scored."""
    several = len(load_run(folder).tasks) > 1
    own = f"{task}-" if several else ""
    for file in (folder / SCORES, folder / f"evaluation-{own}{split}-{EMA}.json"):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            scores = values["scores"]
            if values["split"] == split:
                return numbers(scores[task] if several and file.name == SCORES else scores)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def spreads(scores: Sequence[Mapping[str, float]], task: str, dataset: str) -> dict[str, Spread]:
    """The paper's metrics over seeds."""
    found: dict[str, Spread] = {}
    for metric in METRICS[task]:
        name = score_name(metric, task, dataset)
        values = [one[name] for one in scores if name in one]
        if values:
            found[metric] = spread(values)
    return found


def score_name(metric: str, task: str, dataset: str) -> str:
    """What evaluation calls a metric of the paper: on scenes, mIoU is that of the shapes."""
    entry = find_task(task)
    return headline(entry, dataset) if metric == entry.headline else metric
