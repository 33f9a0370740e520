"""The result of an evaluation: a value that prints as a table, and becomes JSON and CSV."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdiff_cache.tasks import SUBSETS
from mmdiff_cache.training.protocol import features_in_words

LINE = 80
"""Characters of a line of classes; more of them go below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Scores with all that is needed to read them. `str()` is the table, `to_json()` everything."""

    run: str
    task: str
    label: str
    """The label set that it was scored on."""
    data_set: str
    split: str
    samples: int
    backbone: str
    prompts: str
    """Rule of the prompts; scores with `oracle` are an upper bound."""
    source: str
    weights: str
    """Which weights `scores` and `per_sample` are of."""
    step: int
    headline: str
    higher_is_better: bool
    scores: Mapping[str, Any]
    other_weights: Mapping[str, Mapping[str, Any]]
    """The same scores with the other weights of the last step."""
    baselines: Mapping[str, Mapping[str, Any]]
    """The same scores without features, by name."""
    per_sample: Mapping[str, Mapping[str, float]]
    """Each sample's own scores, by sample id."""
    protocol: str
    align: str = "none"
    """What a predicted depth was given of its truth: none, median or lstsq."""
    flip: bool = False
    """Whether the run's outputs are means with those of the mirrored picture."""
    export: str | None = None
    """Where the predictions were written, if they were."""
    untrained: tuple[str, ...] = ()
    """Baselines that are trainings of their own and not made yet."""
    ending: str = "finished"
    """How far the training came: `finished`, or where and why it went no further."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def tables(self) -> dict[str, str]:
        """CSV by what a row is: `samples`, and `classes` where there are any; empty where nothing counts."""
        names = sorted({name for scores in self.per_sample.values() for name in scores})
        rows = [[key, *(scores.get(name) for name in names)] for key, scores in self.per_sample.items()]
        iou: Mapping[str, float | None] = self.scores.get("iou", {})
        classes = {"classes": csv_text(["class", "iou"], iou.items())} if iou else {}
        return {"samples": csv_text(["sample_id", *names], rows), **classes}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(result: Evaluation) -> list[str]:
    """The printed form: what was scored, the table, the classes, the protocol."""
    features = "" if result.source == "hidden_states" else f", source {result.source}"
    columns = [key for key in _columns(result)]
    order = "higher" if result.higher_is_better else "lower"
    rows = [
        ["", *columns],
        [f"{result.weights} weights", *_cells(result.scores, columns)],
        *([f"{name} weights", *_cells(scores, columns)] for name, scores in result.other_weights.items()),
        *([name, *_cells(scores, columns)] for name, scores in result.baselines.items()),
    ]
    lines = [
        f"{result.task} on {result.data_set} {result.split}: {result.headline} "
        f"{_number(_value(result.scores, result.headline))} ({order} is better)",
        f"{features_in_words(result.backbone, result.prompts)}{features}, {result.step} steps"
        + ("" if result.ending == "finished" else f" ({result.ending})"),
        "",
        *_aligned(rows),
    ]
    if result.untrained:
        lines += ["", f"not trained yet: {'; '.join(result.untrained)} (--train-baselines)"]
    iou = result.scores.get("iou")
    if iou:
        lines += ["", "IoU by class", *_wrapped(iou)]
    skipped: int = result.scores.get("skipped", 0)
    empty = [f"{skipped} of them are not in the mean: no pixel of their labels counts"] if skipped else []
    written = [] if result.export is None else ["", f"predictions {result.export}"]
    return [*lines, "", result.protocol, *empty, *written]


def _wrapped(values: Mapping[str, float | None]) -> list[str]:
    """Names with their numbers below, in as many pairs of rows as the line's length takes."""
    names, numbers = list(values), [_number(value) for value in values.values()]
    for count in range(len(names), 0, -1):
        rows = [row[n : n + count] for n in range(0, len(names), count) for row in (names, numbers)]
        lines = _aligned([[*row, *[""] * (count - len(row))] for row in rows])
        if max(map(len, lines)) <= LINE:
            return lines
    return _aligned([[name, number] for name, number in zip(names, numbers, strict=True)])


def csv_text(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """Rows as CSV: numbers in full, None empty, and no text that a spreadsheet would take for a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_plain(cell) for cell in row] for row in [header, *rows])
    return text.getvalue()


def _plain(cell: Any) -> Any:
    formula = isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@") and cell != "-"
    return f"'{cell}" if formula else cell


def _columns(result: Evaluation) -> list[str]:
    """The scores to show, the headline first; classes that the headline leaves out stand beside it."""
    numbers = [
        key for key, value in result.scores.items() if isinstance(value, float) and key != result.headline
    ]
    subset = SUBSETS.get((result.data_set, result.label))
    outside = [name for name in result.scores.get("iou", {}) if subset is not None and name not in subset[1]]
    return [result.headline, *outside, *numbers]


def _value(scores: Mapping[str, Any], key: str) -> float | None:
    return scores[key] if key in scores else scores.get("iou", {}).get(key)


def _cells(scores: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    return [_number(_value(scores, key)) for key in columns]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their longest cell, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
