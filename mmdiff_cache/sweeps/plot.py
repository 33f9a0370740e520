"""The headline of every row of a sweep with its spread, as a picture."""

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmdiff_cache.sweeps.results import HELD_OUT
from mmdiff_cache.sweeps.table import Row, Table

WIDTH_INCHES, MARGIN_INCHES, LINE_INCHES = 6.0, 0.9, 0.2
TITLE_LENGTH = 56
"""Characters of a line of a row's title."""


def draw_table(table: Table, path: Path) -> None:
    """Write a PNG: a panel for each headline score, a line for each row, its standard deviation as a bar."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in table.rows:
        for headline in row.headlines:
            panels.setdefault((row.task, headline), []).append(row)
    heights = [sum(map(_height, rows)) + MARGIN_INCHES for rows in panels.values()]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights)))
    FigureCanvasAgg(figure)  # draws without a window, whatever backend is chosen elsewhere
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, gridspec_kw={"hspace": 0.5})
    for number, ((task, headline), rows) in enumerate(panels.items()):
        _draw_panel(axes[number, 0], task, headline, rows)
    figure.savefig(path, dpi=150, bbox_inches="tight")  # titles may be longer than the picture is wide


def _title(row: Row) -> str:
    return textwrap.fill(row.title or row.task, TITLE_LENGTH)


def _height(row: Row) -> float:
    return LINE_INCHES * (_title(row).count("\n") + 2)


def _draw_panel(axes: Axes, task: str, headline: str, rows: list[Row]) -> None:
    """One headline. The first row stands on top."""
    places = range(len(rows))
    splits = dict.fromkeys(where for row in rows for where in row.scores if where != HELD_OUT)
    whole = (where for where in splits if all(headline in row.scores.get(where, {}) for row in rows))
    where = next(whole, HELD_OUT)
    found = [row.scores.get(where, {}).get(headline) for row in rows]
    for place, spread in zip(places, found, strict=True):
        if spread is not None:
            axes.errorbar(spread.mean, place, xerr=spread.deviation, fmt="o", color="black", capsize=3)
    axes.set_yticks(list(places), [_title(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    better = "higher" if rows[0].headlines[headline] else "lower"
    axes.set_xlabel(
        f"{task}: {where} {headline} ({better} is better), mean and standard deviation over seeds"
    )
