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
from mmdiff_cache.sweeps.table import protocols, shown_scores
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
        scores = [f"{where} {name}" for where, name in self._shown]
        return ["run", *self.columns, *scores, "parameters", "steps", "seconds"]

    def cells(self) -> list[list[str]]:
        """A line a run."""
        return [
            [
                run.path.name,
                *(show(name, flat(run.config).get(name)) for name in self.columns),
                *(_number(run.scores.get(where, {}).get(name)) for where, name in self._shown),
                f"{run.parameters:,}",
                str(run.step) if run.finished else f"{run.step} of {filled(run.config.steps)}",
                "-" if run.seconds is None else f"{run.seconds:.0f}",
            ]
            for run in self.runs
        ]

    @property
    def _shown(self) -> list[tuple[str, str]]:
        return shown_scores((run.scores, run.headlines) for run in self.runs)

    @property
    def protocols(self) -> tuple[str, ...]:
        """How the scores were taken, in words."""
        return protocols(self.runs)

    def by_task(self) -> dict[str, "Comparison"]:
        """The runs of each task side by side, for tasks have different scores."""
        found: dict[str, list[RunResult]] = {}
        for run in self.runs:
            found.setdefault(run.config.task, []).append(run)
        return {task: _side_by_side(runs) for task, runs in found.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"differs": list(self.columns), "runs": [run.to_json() for run in self.runs]}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def compare(paths: Sequence[str | Path]) -> Comparison:
    """Put run folders side by side; a sweep's folder stands for its runs.

    Raises ConfigError for a folder that is neither, CheckpointError for a run that cannot be read.
    """
    folders = dict.fromkeys(folder for path in paths for folder in _runs(Path(path).expanduser()))
    if not folders:
        raise ConfigError("compare needs at least one run that has reached a checkpoint")
    return _side_by_side([read_result(folder) for folder in folders])


def _side_by_side(runs: Sequence[RunResult]) -> Comparison:
    names = differing([run.config for run in runs])
    rows = [flat(run.config) for run in runs]
    # `concept_maps.timesteps`, say, is resolved to `timesteps` where it was left out
    follow = {
        name for name in names if all(row.get(name) == row.get(name.rsplit(".", 1)[-1]) for row in rows)
    }
    return Comparison(
        columns=tuple(name for name in names if "." not in name or name not in follow), runs=tuple(runs)
    )


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
