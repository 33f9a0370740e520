"""What came of a run, read from its folder: scores, size, steps, seconds."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.tasks import find_task, headline
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.build import build_model, spec_from_json
from mmdiff_cache.training.checkpoint import EMA, LAST
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.protocol import features_in_words
from mmdiff_cache.training.run import Run, load_run

T = TypeVar("T")

SCORES = "scores-test.json"
"""Test scores that a sweep wrote into a run's folder."""
EVALUATIONS = "evaluation-*-ema.json"
"""What `evaluate` wrote there, the averaged weights."""
HELD_OUT = "held-out"
"""Beside the names of splits: the samples of the training that pick the best checkpoint."""
HELD_OUT_PROTOCOL = f"{HELD_OUT}: samples of the training split that were never trained on, at network size"
COUNTS = ("samples", "skipped")
"""What stands among the scores and is none; protocols tell it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """One run, finished or not. Scores are those of the averaged weights."""

    path: Path
    config: TrainConfig
    """Resolved."""
    data_set: str
    headlines: Mapping[str, bool]
    """The headline score of each task, and whether higher is better."""
    scores: Mapping[str, Mapping[str, float]]
    """By where they were taken, on the HELD_OUT samples and on each split that was scored, and by name:
    classes as `iou.ball`, of several tasks as `depth abs_rel`.
    """
    parameters: int
    step: int
    finished: bool
    """Whether all steps are done, or it has stopped early."""
    seconds: float | None
    """All steps at the mean speed of the last time it went on; None where no step was timed."""
    protocols: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """How the scores were taken, in words, by where; a line a task."""

    @property
    def headline(self) -> str:
        """The score that comes first: that of the first task."""
        return next(iter(self.headlines))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = ("data_set", "headlines", "scores", "protocols", "parameters", "step", "finished", "seconds")
        values = {name: getattr(self, name) for name in names}
        return {"run": str(self.path), **values, "config": self.config.to_json()}


def read_result(path: str | Path, places: Collection[str | None] | None = None) -> RunResult:
    """Read a run's folder, with the scores taken at these places, by default all.

    Raises CheckpointError if it holds no checkpoint that can be read.
    """
    run = load_run(path)
    parts = [run.for_task(task) for task in run.tasks]
    found = [_by_place(part) for part in parts]
    taken = dict.fromkeys(where for one in found for where in one if places is None or where in places)
    return RunResult(
        path=run.path,
        config=run.config,
        data_set="+".join(dict.fromkeys(part.origin["dataset"] for part in parts)),
        headlines=_by_task(parts, [_headline(part) for part in parts]),
        scores={where: _by_task(parts, [one.get(where, _NONE).scores for one in found]) for where in taken},
        protocols={where: tuple(one[where].protocol for one in found if where in one) for where in taken},
        parameters=count_parameters(run.path),
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
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name not in COUNTS:
            found[prefix + name] = float(value)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scored:
    """Scores of one task, and how they were taken."""

    scores: Mapping[str, float]
    protocol: str


_NONE = _Scored(scores={}, protocol="")


def _by_place(run: Run) -> dict[str, _Scored]:
    """The scores of a run of one task, by where they were taken."""
    found: dict[str, _Scored] = {}
    if EMA in run.scores:
        found[HELD_OUT] = _Scored(scores=numbers(run.scores[EMA]), protocol=HELD_OUT_PROTOCOL)
    for values in _files(run):
        about = (
            f"{run.config.task} on {run.origin['dataset']} {values['split']}, "
            f"{features_in_words(run.origin['backbone'], run.origin['prompts'])}"
        )
        found[str(values["split"])] = _Scored(
            scores=numbers(values["scores"]), protocol=f"{about}: {values['protocol']}"
        )
    return found


def _files(run: Run) -> Iterator[Mapping[str, Any]]:
    """What the sweep and `evaluate` wrote of a run of one task as it is now, the newest last."""
    task = run.config.task
    files = [*run.path.glob(SCORES), *run.path.glob(EVALUATIONS)]
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
        values = _read(file)
        if values is not None and values["step"] == run.step:
            if file.name == SCORES and task in values["scores"]:  # of a run of several tasks
                yield {**values, **{name: values[name][task] for name in ("scores", "protocol")}}
            elif values.get("task", task) == task:
                yield values


def is_scored(run: Run) -> bool:
    """Whether a sweep has scored a run as it is now."""
    values = _read(run.path / SCORES)
    return values is not None and values["step"] == run.step


def _read(file: Path) -> dict[str, Any] | None:
    """A file of scores; None for one that is not there, or says too little of them."""
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    wanted = {"split", "step", "protocol", "scores"}
    return values if isinstance(values, dict) and wanted <= values.keys() else None


def count_parameters(folder: Path) -> int:
    """Trainable parameters; the model is built without memory."""
    with torch.device("meta"):
        model = build_model(spec_from_json(checkpoint.read_header(folder / LAST).spec))
    return sum(model.parameter_counts().values())


def _seconds(run: Run) -> float | None:
    speeds = [line["samples_per_second"] for line in read_metrics(run.path) if line.get("samples_per_second")]
    return run.step * filled(run.config.batch_size) / speeds[-1] if speeds else None
