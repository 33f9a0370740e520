"""A table for a reader: on a screen, as Markdown and CSV, as a picture, and all of it as JSON."""

import csv
import io
import textwrap

from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmdiff_cache.experiments.curves import late_change
from mmdiff_cache.experiments.judgement import Judgement
from mmdiff_cache.experiments.outcome import Outcome, score_name
from mmdiff_cache.experiments.result import TableResult
from mmdiff_cache.experiments.table import LOWER_IS_BETTER, METRICS
from mmdiff_cache.training import checkpoint

MARKDOWN, CSV, PLOT, CURVES, RESULTS = "table.md", "table.csv", "plot.png", "curves.png", "results.json"
NOT_RUN, NO_FIGURE = "not run", "-"
WIDTH_INCHES, MARGIN_INCHES, LINE_INCHES, CURVES_INCHES = 7.0, 0.9, 0.32, 3.2
COLOURS = ("black", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
TITLE_LENGTH = 48
"""Characters of a line of a row's name in the picture."""


def header(result: TableResult, task: str) -> list[str]:
    """Titles of `cells`: scores as evaluation calls them, with an arrow that says which way is better."""
    data = dict.fromkeys(one.dataset for one in result.outcomes if one.task == task)
    names = [
        " or ".join(dict.fromkeys(score_name(name, task, one) for one in data)) for name in METRICS[task]
    ]
    held_out = f"held-out {names[0]} (change in its last fifth)"
    return ["row", "seeds", *map(score_title, names), "parameters", held_out]


def cells(result: TableResult, task: str) -> list[list[str]]:
    """The lines of one task: our mean and deviation over seeds, the paper's figure in brackets."""
    lines: list[list[str]] = []
    for one in result.outcomes:
        if one.task == task:
            seeds = str(len(one.runs)) if one.scores else NOT_RUN
            lines.append(
                [
                    one.row,
                    seeds,
                    *(_cell(one, metric) for metric in METRICS[task]),
                    NO_FIGURE if one.parameters is None else f"{one.parameters:,}",
                    _held_out(one),
                ]
            )
    return lines


def claim_header() -> list[str]:
    """Titles of `claim_cells`."""
    return ["claim", "score", "paper", "gain, a line a seed: all test pictures [95 % interval]", "verdict"]


def claim_cells(result: TableResult) -> list[list[str]]:
    """A line a claim: what its first row gains over the second (+ is better) by seed, and the verdict."""
    return [
        [
            str(one.claim),
            f"{one.claim.task} {score_title(one.claim.metric)}",
            NO_FIGURE if one.paper is None else f"{one.paper:+.3f}",
            "\n".join(map(str, one.differences.values())) or NO_FIGURE,
            _verdict(one),
        ]
        for one in result.judgements
    ]


def _verdict(one: Judgement) -> str:
    """In words; a claim that nothing tested is not open, but not tested."""
    if not one.differences:
        return NOT_RUN
    return one.verdict if one.reason is None else f"{one.verdict} ({one.reason})"


def markdown(result: TableResult) -> str:
    """The whole table, with its notes and what was not run."""
    parts = [
        f"# {result.table.title}",
        f"World: {result.world}. Means over seeds; the paper's figures in brackets. The last column is the "
        "score on held-out training pictures, and by how much it changed in the last fifth of the steps.",
    ]
    for task in result.tasks:
        data = dict.fromkeys(one.dataset for one in result.outcomes if one.task == task)
        parts.append(
            f"## {task} on {', '.join(data)}\n\n{as_markdown(header(result, task), cells(result, task))}"
        )
    if result.judgements:
        parts.append(f"## Claims\n\n{as_markdown(claim_header(), claim_cells(result))}")
    if result.table.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in result.table.notes))
    if result.failed:
        parts.append("## Not run\n\n" + "\n".join(f"- {line}" for line in result.failed))
    return "\n\n".join(parts) + "\n"


def to_csv(result: TableResult) -> str:
    """A line for every row, task and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "task", "dataset", "metric", "mean", "std", "seeds", "paper", "reason"])
    for one in result.outcomes:
        for metric in METRICS[one.task]:
            score = one.scores.get(metric)
            ours = ["", "", "0"] if score is None else [score.mean, _or_empty(score.deviation), score.seeds]
            paper = _or_empty(one.paper.get(metric))
            writer.writerow([one.row, one.task, one.dataset, metric, *ours, paper, one.reason or ""])
    return out.getvalue()


def write_report(result: TableResult) -> None:
    """All files of a table. Raises StorageError where the folder refuses."""
    try:
        result.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise checkpoint.refusal(f"the folder {result.path}", error, option="--out") from error
    checkpoint.write_bytes(result.path / MARKDOWN, markdown(result).encode(), "--out")
    checkpoint.write_bytes(result.path / CSV, to_csv(result).encode(), "--out")
    checkpoint.write_json(result.path / RESULTS, result.to_json(), "--out")
    if any(one.scores for one in result.outcomes):
        draw(result)
    if any(one.curve for one in result.outcomes):
        draw_all_curves(result)


def draw(result: TableResult) -> None:
    """A panel a task: the first metric of every row with its deviation, and the paper's figure as a ring."""
    panels = {task: [one for one in result.outcomes if one.task == task] for task in result.tasks}
    heights = [len(lines) * LINE_INCHES + MARGIN_INCHES for lines in panels.values()]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a window, whatever backend is chosen elsewhere
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for number, (task, lines) in enumerate(panels.items()):
        _draw_panel(axes[number, 0], task, lines)
    figure.savefig(result.path / PLOT, dpi=150, bbox_inches="tight")


def _draw_panel(axes: Axes, task: str, lines: list[Outcome]) -> None:
    metric = METRICS[task][0]
    for place, one in enumerate(lines):
        score, paper = one.scores.get(metric), one.paper.get(metric)
        if score is not None:
            axes.errorbar(score.mean, place, xerr=score.deviation, fmt="o", color="black", capsize=3)
        if paper is not None:
            axes.plot(paper, place, "o", markerfacecolor="none", color="tab:blue")
    axes.set_yticks(range(len(lines)), [textwrap.fill(one.row, TITLE_LENGTH) for one in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    ring = "; ring: the paper, on its own data" if any(metric in one.paper for one in lines) else ""
    name = ", ".join(dict.fromkeys(score_name(metric, task, one.dataset) for one in lines))
    axes.set_xlabel(f"{task}: {name} ({better} is better){ring}")


def draw_all_curves(result: TableResult) -> None:
    """A panel a task: the first metric of every row on the held-out training pictures, step by step."""
    figure = Figure(figsize=(WIDTH_INCHES, CURVES_INCHES * len(result.tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(result.tasks), 1, squeeze=False)
    for number, task in enumerate(result.tasks):
        panel: Axes = axes[number, 0]
        lines = [one for one in result.outcomes if one.task == task and one.curve]
        panel.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * cycler(color=COLOURS))
        for one in lines:
            panel.plot(*zip(*one.curve, strict=True), label=textwrap.fill(one.row, TITLE_LENGTH), linewidth=1)
        names = ", ".join(dict.fromkeys(score_name(METRICS[task][0], task, one.dataset) for one in lines))
        panel.set_ylabel(f"held-out {names}")
        panel.set_xlabel(f"{task}: steps")
        panel.grid(alpha=0.3)
        if lines:
            panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="x-small")
    figure.savefig(result.path / CURVES, dpi=150, bbox_inches="tight")


def score_title(metric: str) -> str:
    """A metric with an arrow that says which way is better."""
    return f"{metric} {'↓' if metric in LOWER_IS_BETTER else '↑'}"


def _cell(one: Outcome, metric: str) -> str:
    score, paper = one.scores.get(metric), one.paper.get(metric)
    ours = NO_FIGURE if score is None else str(score)
    return ours if paper is None else f"{ours} ({paper:g})"


def _held_out(one: Outcome) -> str:
    """The score that choices may be made by, and whether the steps were enough."""
    if not one.curve:
        return NO_FIGURE
    score, late = f"{one.curve[-1][1]:.4f}", late_change(one.curve)
    return score if late is None else f"{score} ({late:+.4f})"


def _or_empty(value: float | None) -> float | str:
    return "" if value is None else value


def as_markdown(titles: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; line breaks inside cells stay."""
    return "\n".join(map(_markdown_line, [titles, ["---"] * len(titles), *lines]))


def _markdown_line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), '<br>') for cell in cells)} |"
