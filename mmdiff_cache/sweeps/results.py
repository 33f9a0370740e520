"""What came of a run, read from its folder: scores, size, steps, seconds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.tasks import find_task, headline
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.build import build_model, spec_from_json
from mmdiff_cache.training.checkpoint import EMA, LAST
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.run import Run, load_run

T = TypeVar("T")

SCORES = "scores-test.json"
"""Test scores that a sweep wrote into a run's folder."""
EVALUATIONS = "evaluation-*-ema.json"
"""What `evaluate` wrote there, the averaged weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """One run, finished or not. Scores are those of the averaged weights."""

    path: Path
    config: TrainConfig
    """Resolved."""
    data_set: str
    headlines: Mapping[str, bool]
    """The headline score of each task, and whether higher is better."""
    held_out: Mapping[str, float]
    """Scores by name on the held-out samples, classes as `iou.ball`; empty where there are none. Of several
    tasks as `depth abs_rel`.
    """
    test: Mapping[str, float]
    """The same on `split`."""
    split: str | None
    parameters: int
    step: int
    finished: bool
    """Whether all steps are done, or it has stopped early."""
    seconds: float | None
    """All steps at the mean speed of the last time it went on; None where no step was timed."""

    @property
    def headline(self) -> str:
        """The score that comes first: that of the first task."""
        return next(iter(self.headlines))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = ("data_set", "headlines", "split", "parameters", "step", "finished", "seconds")
        values = {name: getattr(self, name) for name in names}
        scores = {"held_out": dict(self.held_out), "test": dict(self.test)}
        return {"run": str(self.path), **values, **scores, "config": self.config.to_json()}


def read_result(path: str | Path) -> RunResult:
    """Read a run's folder. Raises CheckpointError if it holds no checkpoint that can be read."""
    run = load_run(path)
    parts = [run.for_task(task) for task in run.tasks]
    found = [_test_scores(part) for part in parts]
    split = next((split for split, _ in found if split is not None), None)
    tested = [scores if where == split else {} for where, scores in found]
    return RunResult(
        path=run.path,
        config=run.config,
        data_set="+".join(dict.fromkeys(part.origin["dataset"] for part in parts)),
        headlines=_by_task(parts, [_headline(part) for part in parts]),
        held_out=_by_task(parts, [numbers(part.scores.get(EMA, {})) for part in parts]),
        test=_by_task(parts, tested),
        split=split,
        parameters=_parameters(run.path),
        step=run.step,
        finished=run.finished,
        seconds=_seconds(run),
    )


def _by_task(parts: Sequence[Run], values: Sequence[Mapping[str, T]]) -> dict[str, T]:
    """Values of a run's tasks as those of the run: of several, each with its task before its name."""
    if len(parts) == 1:
        return dict(values[0])
    return {
        f"{part.config.task} {name}": value
        for part, own in zip(parts, values, strict=True)
        for name, value in own.items()
    }


def _headline(run: Run) -> dict[str, bool]:
    task = find_task(run.config.task, run.config.label)
    return {headline(task, run.origin["dataset"]): task.higher_is_better}


def numbers(scores: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All scores that are numbers, those of classes by dotted names."""
    found: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found


def _test_scores(run: Run) -> tuple[str | None, dict[str, float]]:
    """What the sweep or `evaluate` wrote for a task, with the split; of several files the newest."""
    task, folder = run.config.task, run.path
    files = [*folder.glob(SCORES), *folder.glob(EVALUATIONS)]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if task in values["scores"]:  # a sweep's, of several tasks
                return str(values["split"]), numbers(values["scores"][task])
            if values.get("task", task) == task:
                return str(values["split"]), numbers(values["scores"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return None, {}


def _parameters(folder: Path) -> int:
    """Trainable parameters; the model is built without memory."""
    with torch.device("meta"):
        model = build_model(spec_from_json(checkpoint.read_header(folder / LAST).spec))
    return sum(model.parameter_counts().values())


def _seconds(run: Run) -> float | None:
    speeds = [line["samples_per_second"] for line in read_metrics(run.path) if line.get("samples_per_second")]
    return run.step * filled(run.config.batch_size) / speeds[-1] if speeds else None
