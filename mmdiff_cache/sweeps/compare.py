"""Runs side by side: what differs in their configurations, and what came of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff_cache.config import filled
from mmdiff_cache.errors import CheckpointError, ConfigError
from mmdiff_cache.sweeps.differences import differing, flat, show
from mmdiff_cache.sweeps.results import RunResult, read_result
from mmdiff_cache.training.checkpoint import LAST

RECORD = "sweep.json"
"""What makes a folder that of a sweep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Runs, and the fields of their configurations that are not the same in all."""

    columns: tuple[str, ...]
    runs: tuple[RunResult, ...]

    def header(self) -> list[str]:
        """Titles of `cells`."""
        scores = [f"{where} {name}" for where, name in self._scores]
        return ["run", *self.columns, *scores, "parameters", "steps", "seconds"]

    def cells(self) -> list[list[str]]:
        """A line a run."""
        return [
            [
                run.path.name,
                *(show(name, flat(run.config).get(name)) for name in self.columns),
                *(_number(_scores_of(run, where).get(name)) for where, name in self._scores),
                f"{run.parameters:,}",
                str(run.step) if run.finished else f"{run.step} of {filled(run.config.steps)}",
                "-" if run.seconds is None else f"{run.seconds:.0f}",
            ]
            for run in self.runs
        ]

    @property
    def _scores(self) -> list[tuple[str, str]]:
        """Headlines first held out, then on the evaluated splits with all that is no class's own."""
        held_out = dict.fromkeys(
            ("held-out", name) for run in self.runs if run.held_out for name in run.headlines
        )
        tested = dict.fromkeys(
            (run.split or "", name)
            for run in self.runs
            for name in sorted(run.test, key=lambda name: name not in run.headlines)
            if "." not in name or name in run.headlines
        )
        return [*held_out, *tested]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"differs": list(self.columns), "runs": [run.to_json() for run in self.runs]}


def _scores_of(run: RunResult, where: str) -> dict[str, float]:
    return dict(run.held_out if where == "held-out" else run.test if where == run.split else {})


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def compare(paths: Sequence[str | Path]) -> Comparison:
    """Put run folders side by side; a sweep's folder stands for its runs.

    Raises ConfigError for a folder that is neither, CheckpointError for a run that cannot be read.
    """
    folders = dict.fromkeys(folder for path in paths for folder in _runs(Path(path).expanduser()))
    if not folders:
        raise ConfigError("compare needs at least one run that has reached a checkpoint")
    results = tuple(read_result(folder) for folder in folders)
    return Comparison(columns=differing([result.config for result in results]), runs=results)


def _runs(path: Path) -> list[Path]:
    if (path / LAST).exists():
        return [path.absolute()]
    if not (path / RECORD).exists():
        raise ConfigError(
            f"{path} is neither a run with a checkpoint ({LAST}) nor a sweep ({RECORD}); "
            "name the folder that 'train' or 'sweep' wrote"
        )
    try:
        names = [str(name) for name in json.loads((path / RECORD).read_text(encoding="utf-8"))["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / RECORD} cannot be read: {error!r}; run the sweep again") from error
    folders = [path.absolute() / Path(name).name for name in names]
    return [folder for folder in folders if (folder / LAST).exists()]
