"""A sheet shows every tile it was given, and everything that is written stays inside."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.visuals.panels import Sheet, Tile, draw_sheet, save_png


def tiles(count: int) -> list[Tile]:
    return [
        Tile(picture=np.full((4, 4, 3), (10 + n, 20, 30), np.uint8), caption=f"tile {n}")
        for n in range(count)
    ]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (3, 1)])
def test_every_tile_is_on_the_sheet_at_full_size(rows: int, columns: int) -> None:
    grid = [tiles(columns) for _ in range(rows)]
    sheet = np.asarray(draw_sheet(Sheet(title="t", rows=grid, columns=["c"] * columns), tile=40))
    for n in range(columns):
        found = int((sheet == (10 + n, 20, 30)).all(axis=-1).sum())
        assert found == rows * 40 * 40


def test_a_long_title_and_legend_widen_or_break_instead_of_being_cut() -> None:
    legend = [(f"a long class name {n}", (n, n, n)) for n in range(12)]
    sheet = np.asarray(draw_sheet(Sheet(title="x" * 200, rows=[tiles(1)], legend=legend), tile=40))
    assert (sheet[:, -8:] == 255).all(), "the right margin stays empty"
    for n in range(12):
        assert (sheet == n).all(axis=-1).any(), f"legend entry {n} is drawn"


def test_a_saved_sheet_is_a_readable_png_with_the_same_pixels(tmp_path: Path) -> None:
    drawn = draw_sheet(Sheet(title="t", rows=[tiles(2)]))
    path = save_png(drawn, tmp_path / "new" / "sheet.png")
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(opened.convert("RGB")), np.asarray(drawn))
