"""Draws loss curves from metrics.jsonl, with Pillow alone."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

_COLOURS = (
    *("#1b6ca8", "#c0392b", "#27864b", "#8e44ad", "#d68910", "#16a085"),
    *("#7f8c8d", "#2c3e50", "#e377c2", "#8c564b", "#9acd32", "#5dade2"),
)
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _RIGHT, _TOP = 760, 380, 56, 36, 110, 16


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; of a step logged twice after a restart the later one."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return list({row["step"]: row for row in rows}.values())


def draw_curves(rows: list[dict[str, Any]], kind: str) -> Image.Image:
    """Loss by time over the steps; `kind` is 'train' or 'validation'."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.get(kind, {}).items():
            series.setdefault(f"t {name}", []).append((row["step"], value))
    return draw_lines(series, f"{kind} loss (velocity MSE) by step; one line for each range of t")


def draw_lines(series: Mapping[str, Sequence[tuple[float, float]]], caption: str) -> Image.Image:
    """Lines of positive values over steps, the values on a logarithmic scale, the first line the boldest."""
    points = [point for line in series.values() for point in line]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = (math.log(f(y for _, y in points)) for f in (min, max))
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen = ImageDraw.Draw(image)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / max(1e-9, last - first)
        up = (math.log(y) - low) / max(1e-9, high - low)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP),
        )

    for part in range(5):
        y = math.exp(low + (high - low) * part / 4)
        x = first + (last - first) * part / 4
        pen.line([place(first, y), place(last, y)], fill="#dddddd")
        pen.text((4, place(first, y)[1] - 6), f"{y:.3f}", fill="black")
        pen.text((place(x, y)[0] - 12, _HEIGHT - _BOTTOM + 6), f"{x:.0f}", fill="black")
    pen.text((_LEFT, _HEIGHT - 14), caption, fill="black")
    for number, (name, line) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        pen.line([place(*point) for point in line], fill=colour, width=3 if number == 0 else 1)
        pen.text((_WIDTH - _RIGHT + 8, _TOP + 16 * number), name, fill=colour)
    return image
