"""Sheets of pictures: rows of captioned tiles with a title, row labels and a legend, drawn with pillow."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mmdiff_cache.records import LabelSpec
from mmdiff_cache.visuals.colours import depth_range, enlarge, label_to_colour

INK, QUIET, PAPER = (32, 33, 36), (110, 113, 120), (255, 255, 255)
TILE: Final = 160
_GAP: Final = 8
_CAPTION: Final = 18
_MARGIN: Final = 16
_LINE: Final = 22

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One picture of a sheet with a line of text below it."""

    picture: NDArray[np.uint8]
    caption: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """Rows of tiles. `columns` head the columns; `legend` pairs a name with a colour."""

    title: str
    rows: Sequence[Sequence[Tile]]
    note: str = ""
    columns: Sequence[str] = ()
    row_labels: Sequence[str] = ()
    legend: Sequence[tuple[str, tuple[int, int, int]]] = ()


def truth_and_guess(
    label: LabelSpec, truth: NDArray[Any], guess: NDArray[Any], image: NDArray[np.uint8], caption: str = ""
) -> tuple[Tile, Tile]:
    """The label and the prediction of one sample on one colour scale; `caption` goes below the prediction."""
    span = depth_range(truth) if label.kind == "depth" else None
    unit = "" if span is None else f"{span[0]:.1f} to {span[1]:.1f} m"
    return (
        Tile(picture=label_to_colour(label, truth, image, span), caption=unit),
        Tile(picture=label_to_colour(label, guess, image, span), caption=caption),
    )


def draw_sheet(sheet: Sheet, tile: int = TILE) -> Image.Image:
    """Lay a sheet out.

    Tiles are enlarged in whole steps to about `tile` pixels; rows may differ in length.
    """
    pictures = [[enlarge(t.picture, tile) for t in row] for row in sheet.rows]
    width = max(p.shape[1] for row in pictures for p in row)
    height = max(p.shape[0] for row in pictures for p in row)
    captioned = any(t.caption for row in sheet.rows for t in row)
    label_width = _label_width(sheet.row_labels)
    step_x, step_y = width + _GAP, height + _GAP + (_CAPTION if captioned else 0)
    header = _header_lines(sheet)
    legend = _legend_rows(sheet.legend, label_width + max(map(len, pictures)) * step_x)
    top = _MARGIN + _LINE * header + (_LINE if sheet.columns else 0)
    canvas = Image.new(
        "RGB",
        (
            2 * _MARGIN + max(label_width + max(map(len, pictures)) * step_x, _text_width(sheet)),
            top + len(pictures) * step_y + _LINE * len(legend) + _MARGIN,
        ),
        PAPER,
    )
    pen = ImageDraw.Draw(canvas)
    _draw_header(pen, sheet)
    for number, name in enumerate(sheet.columns):
        pen.text((_MARGIN + label_width + number * step_x, top - _LINE + 3), name, INK, _font(13))
    for line, row in enumerate(pictures):
        y = top + line * step_y
        if line < len(sheet.row_labels):
            pen.text((_MARGIN, y + height // 2 - 8), sheet.row_labels[line], INK, _font(13))
        for number, picture in enumerate(row):
            x = _MARGIN + label_width + number * step_x
            canvas.paste(Image.fromarray(picture), (x, y))
            pen.text((x, y + height + 2), sheet.rows[line][number].caption, QUIET, _font(12))
    _draw_legend(pen, legend, top + len(pictures) * step_y)
    return canvas


def save_png(picture: Image.Image, path: Path) -> Path:
    """Write a PNG, with a palette where that loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    few = picture.getcolors(256)
    stored = picture.quantize(256, dither=Image.Dither.NONE) if few is not None else picture
    stored.save(path, optimize=True)
    return path


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _header_lines(sheet: Sheet) -> int:
    return 1 + bool(sheet.note)


def _text_width(sheet: Sheet) -> int:
    return int(max(_font(16).getlength(sheet.title), _font(13).getlength(sheet.note)))


def _label_width(labels: Sequence[str]) -> int:
    return int(max((_font(13).getlength(label) for label in labels), default=-_GAP)) + _GAP


def _draw_header(pen: ImageDraw.ImageDraw, sheet: Sheet) -> None:
    pen.text((_MARGIN, _MARGIN - 4), sheet.title, INK, _font(16))
    if sheet.note:
        pen.text((_MARGIN, _MARGIN + _LINE - 4), sheet.note, QUIET, _font(13))


def _legend_rows(
    entries: Sequence[tuple[str, tuple[int, int, int]]], width: int
) -> list[list[tuple[int, str, tuple[int, int, int]]]]:
    """Entries with their x positions, broken into lines that fit into `width` pixels."""
    rows: list[list[tuple[int, str, tuple[int, int, int]]]] = []
    x = width
    for name, colour in entries:
        length = int(_font(13).getlength(name)) + 34
        if x + length > width:
            rows.append([])
            x = 0
        rows[-1].append((x, name, colour))
        x += length
    return rows


def _draw_legend(
    pen: ImageDraw.ImageDraw, rows: list[list[tuple[int, str, tuple[int, int, int]]]], top: int
) -> None:
    for line, row in enumerate(rows):
        y = top + line * _LINE + 4
        for x, name, colour in row:
            pen.rectangle((_MARGIN + x, y, _MARGIN + x + 13, y + 13), fill=colour, outline=QUIET)
            pen.text((_MARGIN + x + 18, y - 2), name, INK, _font(13))
