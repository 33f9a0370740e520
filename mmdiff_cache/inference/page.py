"""One HTML page that shows pictures side by side: plain files beside it, nothing from the network, all text
escaped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
p { color: color-mix(in srgb, currentcolor 65%, transparent); margin: .25rem 0; }
.row { display: flex; flex-wrap: wrap; gap: .75rem; }
figure { margin: 0; flex: 1 1 14rem; max-width: 24rem; }
img { width: 100%; height: auto; display: block; border-radius: .3rem; image-rendering: pixelated; }
.row > figure:only-child { max-width: 100%; } figure:only-child img { image-rendering: auto; }
figcaption { font-size: .85rem; }
ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1rem; padding: 0; font-size: .85rem; }
i { display: inline-block; width: .8em; height: .8em; border: 1px solid #8888; margin-right: .35em; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A picture of the page: a file beside or below the page, and its caption."""

    file: Path
    caption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Pictures that belong together, under one heading."""

    heading: str
    figures: Sequence[Figure]
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """The whole page. `legend` pairs a name with a colour (red, green, blue)."""

    title: str
    rows: Sequence[Row]
    note: str = ""
    legend: Sequence[tuple[str, tuple[int, int, int]]] = ()


def write_page(page: Page, path: Path) -> Path:
    """Write the page to `path`; its pictures are linked relative to the folder of `path`."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(page.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(page.title)}</h1>",
        *([f"<p>{escape(page.note)}</p>"] if page.note else []),
        *_legend(page.legend),
        *(part for row in page.rows for part in _row(row, path.parent)),
        "</body></html>",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return path


def _row(row: Row, folder: Path) -> list[str]:
    note = [f"<p>{escape(row.note)}</p>"] if row.note else []
    figures = [_figure(figure, folder) for figure in row.figures]
    return [f"<h2>{escape(row.heading)}</h2>", *note, '<div class="row">', *figures, "</div>"]


def _figure(figure: Figure, folder: Path) -> str:
    link = quote(figure.file.relative_to(folder).as_posix())
    caption = escape(figure.caption)
    return f'<figure><img src="{link}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _legend(entries: Sequence[tuple[str, tuple[int, int, int]]]) -> list[str]:
    if not entries:
        return []
    items = [
        f'<li><i style="background:rgb({red},{green},{blue})"></i>{escape(name)}</li>'
        for name, (red, green, blue) in entries
    ]
    return ["<ul>", *items, "</ul>"]
