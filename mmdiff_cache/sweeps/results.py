"""What came of a run, read from its folder: scores, size, steps, seconds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.tasks import find_task, headline
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.build import build_model, spec_from_json
from mmdiff_cache.training.checkpoint import EMA, LAST
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.run import Run, load_run

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
    headline: str
    higher_is_better: bool
    held_out: Mapping[str, float]
    """Scores by name on the held-out samples, classes as `iou.ball`; empty where there are none."""
    test: Mapping[str, float]
    """The same on `split`."""
    split: str | None
    parameters: int
    step: int
    seconds: float | None
    """All steps at the mean speed of the last time it went on; None where no step was timed."""

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= filled(self.config.steps)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = ("data_set", "headline", "higher_is_better", "split", "parameters", "step", "seconds")
        values = {name: getattr(self, name) for name in names}
        scores = {"held_out": dict(self.held_out), "test": dict(self.test)}
        return {"run": str(self.path), **values, **scores, "config": self.config.to_json()}


def read_result(path: str | Path) -> RunResult:
    """Read a run's folder. Raises CheckpointError if it holds no checkpoint that can be read."""
    run = load_run(path)
    task = find_task(run.config.task, run.config.label)
    split, test = _test_scores(run.path)
    return RunResult(
        path=run.path,
        config=run.config,
        data_set=run.origin["dataset"],
        headline=headline(task, run.origin["dataset"]),
        higher_is_better=task.higher_is_better,
        held_out=numbers(run.scores.get(EMA, {})),
        test=test,
        split=split,
        parameters=_parameters(run.path),
        step=run.step,
        seconds=_seconds(run),
    )


def numbers(scores: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All scores that are numbers, those of classes by dotted names."""
    found: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found


def _test_scores(folder: Path) -> tuple[str | None, dict[str, float]]:
    """What the sweep or `evaluate` wrote, with the split; of several files the newest."""
    files = [*folder.glob(SCORES), *folder.glob(EVALUATIONS)]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
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
