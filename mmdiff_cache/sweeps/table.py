"""The table of a sweep: one row a configuration, means and spreads over its seeds."""

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.sweeps.differences import SEEDS, differing, digest, flat, show
from mmdiff_cache.sweeps.results import RunResult

HELD_OUT, TEST = "held-out", "test"


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
    held_out: Mapping[str, Spread]
    """By score, headlines first."""
    test: Mapping[str, Spread]
    parameters: int

    @property
    def title(self) -> str:
        """What sets it apart, in one line."""
        return ", ".join(f"{name.rsplit('.', 1)[-1]} {value}" for name, value in self.settings.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows in the order of the configurations. `cells` is for a screen, `to_csv` has every score."""

    columns: tuple[str, ...]
    """Fields that differ between rows."""
    rows: tuple[Row, ...]

    def header(self) -> list[str]:
        """Titles of `cells`."""
        tasks = () if "task" in self.columns or not self._mixed else ("task",)
        return [*self.columns, *tasks, "seeds", *(f"{where} {name}" for where, name in self._shown)]

    def cells(self) -> list[list[str]]:
        """Settings, seeds and the scores that are shown: the headlines, and what else is no class's own."""
        tasks = "task" not in self.columns and self._mixed
        return [
            [
                *(row.settings.get(name, "-") for name in self.columns),
                *([row.task] if tasks else []),
                str(row.seeds),
                *(str(_scores(row, where).get(name, "-")) for where, name in self._shown),
            ]
            for row in self.rows
        ]

    @property
    def _mixed(self) -> bool:
        return len({row.task for row in self.rows}) > 1

    @property
    def _shown(self) -> list[tuple[str, str]]:
        """Of held-out scores the headline alone, of test scores all but those of classes."""
        held_out = dict.fromkeys(
            (HELD_OUT, name) for row in self.rows if row.held_out for name in row.headlines
        )
        test = dict.fromkeys(
            (TEST, name) for row in self.rows for name in row.test if "." not in name or name in row.headlines
        )
        return [*held_out, *test]

    def to_markdown(self) -> str:
        """The shown cells as a table of Markdown."""
        lines = [self.header(), ["---"] * len(self.header()), *self.cells()]
        return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)

    def to_csv(self) -> str:
        """Every score of every row: mean, standard deviation (empty for one seed) and number of seeds."""
        names = dict.fromkeys((w, n) for w in (HELD_OUT, TEST) for row in self.rows for n in _scores(row, w))
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        parts = ("mean", "std", "seeds")
        titles = [f"{where} {name} {part}" for where, name in names for part in parts]
        settings = [name for name in self.columns if name != "task"]
        writer.writerow(["task", *settings, "headline", "parameters", *titles])
        for row in self.rows:
            cells = [cell for where, name in names for cell in _csv_cells(_scores(row, where).get(name))]
            own = [_plain(row.settings.get(name, "")) for name in settings]
            writer.writerow([row.task, *own, " + ".join(row.headlines), row.parameters, *cells])
        return out.getvalue()


def _csv_cells(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["", "", ""]
    deviation = "" if spread.deviation is None else repr(spread.deviation)
    return [repr(spread.mean), deviation, str(spread.seeds)]


def _plain(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") and text != "-" else text


def _scores(row: Row, where: str) -> Mapping[str, Spread]:
    return row.held_out if where == HELD_OUT else row.test


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
    return Table(columns=columns, rows=tuple(_row(group, columns) for group in rows.values()))


def _row(group: Sequence[RunResult], columns: Sequence[str]) -> Row:
    first = group[0]
    values = flat(first.config)
    return Row(
        settings={name: show(name, values.get(name)) for name in columns},
        task=first.config.task,
        headlines=first.headlines,
        seeds=len(group),
        held_out=_spreads(group, lambda result: result.held_out),
        test=_spreads(group, lambda result: result.test),
        parameters=first.parameters,
    )


def _spreads(
    group: Sequence[RunResult], scores: Callable[[RunResult], Mapping[str, float]]
) -> dict[str, Spread]:
    """Each score over the seeds that have it, headlines first."""
    names = dict.fromkeys(name for result in group for name in scores(result))
    ordered = sorted(names, key=lambda name: name not in group[0].headlines)
    return {name: spread([scores(run)[name] for run in group if name in scores(run)]) for name in ordered}


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation; the order of the values does not matter."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), deviation=deviation, seeds=len(values))
