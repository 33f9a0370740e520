"""A table that was carried out: what came of its rows, and of its claims."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff_cache.experiments.judgement import Judgement
from mmdiff_cache.experiments.outcome import Outcome
from mmdiff_cache.experiments.table import Table, group_reasons


@dataclass(frozen=True, kw_only=True, slots=True)
class TableResult:
    """A table that was carried out."""

    path: Path
    command: str
    """The line that carries it out again."""
    whole: bool
    """Not only some of its rows or tasks."""
    world: str
    table: Table
    tasks: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    """Row by row, for each the tasks that it answers."""
    judgements: tuple[Judgement, ...]
    """Of the claims about tasks that were asked for, in their order."""

    @property
    def failed(self) -> list[str]:
        """What was not run and why, a line a reason."""
        return group_reasons(
            {(one.row, one.task): one.reason for one in self.outcomes if one.reason is not None}
        )

    @property
    def broken(self) -> bool:
        """Whether something failed that could have been run."""
        return any(one.expected and one.reason is not None for one in self.outcomes)

    def find(self, row: str, task: str) -> Outcome | None:
        """What came of a row on a task; None where it does not answer it."""
        return next((one for one in self.outcomes if (one.row, one.task) == (row, task)), None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "title": self.table.title,
            "command": self.command,
            "whole": self.whole,
            "world": self.world,
            "notes": list(self.table.notes),
            "outcomes": [one.to_json() for one in self.outcomes],
            "claims": [one.to_json() for one in self.judgements],
        }
