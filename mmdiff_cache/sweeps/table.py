"""The table of a sweep: one row a configuration, means and spreads over its seeds."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.sweeps.differences import SEEDS, differing, digest, flat, show
from mmdiff_cache.sweeps.results import HELD_OUT, RunResult
from mmdiff_cache.training.report import csv_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A score over seeds."""

    mean: float
    deviation: float | None
    """Standard deviation of a sample (n - 1); None for one seed."""
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.deviation:.4f}" if self.deviation is not None else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One configuration, over its seeds."""

    settings: Mapping[str, str]
    """What sets it apart, by the field's dotted name."""
    task: str
    headlines: Mapping[str, bool]
    """The headline score of each task, and whether higher is better."""
    seeds: int
    scores: Mapping[str, Mapping[str, Spread]]
    """By where they were taken, HELD_OUT or a split, and by name, headlines first."""
    parameters: int

    @property
    def title(self) -> str:
        """What sets it apart, in one line."""
        return ", ".join(f"{name.rsplit('.', 1)[-1]} {value}" for name, value in self.settings.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows in the order of the configurations. `cells` is for a screen, a task at a time (`by_task`);
    `to_csv` has every score.
    """

    columns: tuple[str, ...]
    """Fields that differ between rows."""
    rows: tuple[Row, ...]
    protocols: tuple[str, ...] = ()
    """How the scores were taken, in words."""

    def by_task(self) -> dict[str, "Table"]:
        """A table a task, for tasks have different scores; with the columns that differ in it."""
        found: dict[str, Table] = {}
        for task in dict.fromkeys(row.task for row in self.rows):
            rows = [row for row in self.rows if row.task == task]
            columns = (name for name in self.columns if len({row.settings[name] for row in rows}) > 1)
            found[task] = replace(self, columns=tuple(columns), rows=tuple(rows))
        return found

    def header(self) -> list[str]:
        """Titles of `cells`."""
        return [*self.columns, "seeds", *(f"{where} {name}" for where, name in self._shown)]

    def cells(self) -> list[list[str]]:
        """Settings, seeds and the scores that are shown: the headlines, and what else is no class's own."""
        return [
            [
                *(row.settings.get(name, "-") for name in self.columns),
                str(row.seeds),
                *(_cell(row.scores.get(where, {}).get(name), row.seeds) for where, name in self._shown),
            ]
            for row in self.rows
        ]

    @property
    def _shown(self) -> list[tuple[str, str]]:
        """Of held-out scores the headlines alone, of the others all but those of classes."""
        return shown_scores((row.scores, row.headlines) for row in self.rows)

    def to_markdown(self) -> str:
        """The shown cells as tables of Markdown, one a task, and how the scores were taken."""
        parts = [f"**{task}**\n\n{table.markdown_rows()}" for task, table in self.by_task().items()]
        return "\n".join([*parts, *(f"- {line}" for line in self.protocols), ""])

    def markdown_rows(self) -> str:
        """Header and cells in the syntax of Markdown."""
        lines = [self.header(), ["---"] * len(self.header()), *self.cells()]
        return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)

    def to_csv(self) -> str:
        """Every score of every row: mean, standard deviation (empty for one seed) and number of seeds."""
        names = dict.fromkeys((w, n) for row in self.rows for w in row.scores for n in row.scores[w])
        names = dict.fromkeys(sorted(names, key=lambda name: name[0] != HELD_OUT))
        parts = ("mean", "std", "seeds")
        titles = [f"{where} {name} {part}" for where, name in names for part in parts]
        settings = [name for name in self.columns if name != "task"]
        lines: list[list[str | float | None]] = []
        for row in self.rows:
            found = [row.scores.get(where, {}).get(name) for where, name in names]
            cells = [cell for spread in found for cell in _csv_cells(spread)]
            own = [row.settings.get(name, "") for name in settings]
            lines.append([row.task, *own, " + ".join(row.headlines), row.parameters, *cells])
        return csv_text(["task", *settings, "headline", "parameters", *titles], lines)


def shown_scores(
    several: Iterable[tuple[Mapping[str, Mapping[str, object]], Iterable[str]]],
) -> list[tuple[str, str]]:
    """Which scores a screen has room for, as pairs of where and name; given scores, and their headlines.

    Held out the headlines alone; elsewhere the headlines, and what is no class's own.
    """
    held_out: dict[tuple[str, str], None] = {}
    others: dict[tuple[str, str], None] = {}
    for scores, headlines in several:
        for where, found in scores.items():
            names = [name for name in headlines if name in found]
            if where == HELD_OUT:
                held_out |= dict.fromkeys((where, name) for name in names)
            else:
                others |= dict.fromkeys(
                    (where, name) for name in (*names, *(name for name in found if "." not in name))
                )
    return [*held_out, *others]


def _cell(spread: Spread | None, seeds: int) -> str:
    """A spread on a screen; with the number of its seeds where not all of the row have the score."""
    if spread is None:
        return "-"
    return str(spread) if spread.seeds == seeds else f"{spread} ({spread.seeds} of {seeds})"


def _csv_cells(spread: Spread | None) -> list[float | None]:
    return [None] * 3 if spread is None else [spread.mean, spread.deviation, spread.seeds]


def tabulate(results: Sequence[RunResult], asked: Sequence[TrainConfig] = ()) -> Table:
    """Put runs that differ only in their seeds into one row.

    The columns are what differs between the configurations that were asked for, by default between those of
    the runs.
    """
    configs = [result.config for result in results]
    columns = tuple(name for name in differing(asked or configs) if name not in SEEDS)
    rows: dict[str, list[RunResult]] = {}
    for result in results:
        rows.setdefault(digest(result.config, without=SEEDS), []).append(result)
    return Table(
        columns=columns,
        rows=tuple(_row(group, columns) for group in rows.values()),
        protocols=protocols(results),
    )


def protocols(results: Iterable[RunResult]) -> tuple[str, ...]:
    """How the scores of runs were taken, each way once."""
    return tuple(dict.fromkeys(line for one in results for lines in one.protocols.values() for line in lines))


def _row(group: Sequence[RunResult], columns: Sequence[str]) -> Row:
    first = group[0]
    values = flat(first.config)
    places = dict.fromkeys(where for result in group for where in result.scores)
    return Row(
        settings={name: show(name, values.get(name)) for name in columns},
        task=first.config.task,
        headlines=first.headlines,
        seeds=len(group),
        scores={where: _spreads(group, where) for where in places},
        parameters=first.parameters,
    )


def _spreads(group: Sequence[RunResult], where: str) -> dict[str, Spread]:
    """Each score over the seeds that have it, headlines first."""
    found = [result.scores.get(where, {}) for result in group]
    names = sorted(
        dict.fromkeys(name for scores in found for name in scores),
        key=lambda name: name not in group[0].headlines,
    )
    return {name: spread([scores[name] for scores in found if name in scores]) for name in names}


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation; the order of the values does not matter."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), deviation=deviation, seeds=len(values))
