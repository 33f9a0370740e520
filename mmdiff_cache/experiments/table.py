"""What a table asks: rows with their trainings and the paper's figures, and the claims that it tests.

Values only. A recipe writes them down before anything runs; `run` carries them out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.errors import ConfigError

METRICS: Mapping[str, tuple[str, ...]] = {
    "segmentation": ("miou",),
    "saliency": ("s_measure", "max_f", "mae"),
    "depth": ("abs_rel", "rmse", "delta1", "delta2", "delta3"),
}
"""The columns of the paper's tables, by task; the first is the one that a claim is about by default."""
LOWER_IS_BETTER = frozenset(("mae", "abs_rel", "rmse"))

Figures = Mapping[str, Mapping[str, float]]
"""Scores as the paper prints them, by task and metric; mIoU as a share of 1."""


def group_reasons(reasons: Mapping[tuple[str, str], str]) -> list[str]:
    """What was not run and why, by row and task, in as few lines as there are reasons."""
    rows: dict[str, dict[str, list[str]]] = {}
    for (row, task), reason in reasons.items():
        rows.setdefault(reason, {}).setdefault(row, []).append(task)
    return [
        "; ".join(f"{row} ({', '.join(tasks)})" for row, tasks in found.items()) + f": {reason}"
        for reason, found in rows.items()
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One model, for one task or for several, and where its features come from."""

    config: TrainConfig
    """Without stores, seed and folder, which `run` fills in. None is the default of backbone or task."""
    datasets: tuple[str, ...]
    """The data set of each of its tasks."""
    backbone: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it is trained for."""
        return tuple(self.config.task.split("+"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of a table: at most one training answers each task."""

    name: str
    trainings: tuple[Training, ...]
    paper: Figures
    """Empty where the paper has no such row."""

    def __post_init__(self) -> None:
        answered = [task for training in self.trainings for task in training.tasks]
        twice = next((task for task in answered if answered.count(task) > 1), None)
        if twice is not None:
            raise ConfigError(f"row {self.name!r} answers {twice} twice; give it one training a task")

    def training(self, task: str) -> Training | None:
        """The one that answers a task."""
        return next((training for training in self.trainings if task in training.tasks), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One row scores better than another: fixed before anything runs."""

    better: str
    """Name of a row."""
    worse: str
    task: str
    metric: str
    source: str
    """Where the paper says so; `ours` for a claim that it does not make."""
    beyond: tuple[str, str] | None = None
    """Names of a better and a worse row: the claim is then that the gain is larger than theirs."""

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of all rows that it is about."""
        return (self.better, self.worse, *(self.beyond or ()))

    def __str__(self) -> str:
        more = "" if self.beyond is None else f", by more than {' > '.join(self.beyond)}"
        return f"{self.better} > {self.worse}{more} ({self.source})"


def figures(*values: float) -> Figures:
    """A line of the paper's tables with all nine metrics, in its order."""
    given = iter(values)
    return {task: {metric: next(given) for metric in metrics} for task, metrics in METRICS.items()}


def claims(better: str, worse: str, source: str, tasks: Sequence[str] = tuple(METRICS)) -> tuple[Claim, ...]:
    """That one row is better than another on each task, by its first metric."""
    return tuple(
        Claim(better=better, worse=worse, task=task, metric=METRICS[task][0], source=source) for task in tasks
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of the paper, in some world."""

    title: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()
    """What a reader has to know beside the numbers."""

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"a table needs rows with a name each, got {names}")
        for claim in self.claims:
            _check_claim(claim, {row.name: row for row in self.rows})

    @property
    def tasks(self) -> tuple[str, ...]:
        """All that some row answers, in the order of METRICS."""
        return tuple(task for task in METRICS if any(row.training(task) for row in self.rows))

    def only(self, names: Sequence[str]) -> "Table":
        """The rows of these names, or whose name has the text in it where none is called so, and the claims
        between them.

        Raises ConfigError for a text that no row has.
        """
        called = {row.name for row in self.rows}
        for name in names:
            if not any(name in row.name for row in self.rows):
                raise ConfigError(
                    f"no row has {name!r} in its name; there are {', '.join(row.name for row in self.rows)}"
                )
        rows = tuple(
            row
            for row in self.rows
            if any(name == row.name if name in called else name in row.name for name in names)
        )
        kept = {row.name for row in rows}
        about = tuple(claim for claim in self.claims if set(claim.rows) <= kept)
        return replace(self, rows=rows, claims=about)


def _check_claim(claim: Claim, rows: Mapping[str, Row]) -> None:
    """Raise ConfigError for a claim about what the table does not have."""
    for name in claim.rows:
        if name not in rows:
            raise ConfigError(f"a claim is about row {name!r}, but there are {', '.join(rows)}")
        if rows[name].training(claim.task) is None:
            raise ConfigError(f"a claim is about {claim.task}, which row {name!r} does not train")
    if claim.metric not in METRICS[claim.task]:
        raise ConfigError(
            f"a claim about {claim.task} needs one of {', '.join(METRICS[claim.task])}, got {claim.metric!r}"
        )
