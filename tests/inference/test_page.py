"""The page is safe to open: text is escaped, and it asks nothing of the network."""

from html.parser import HTMLParser
from pathlib import Path

from mmdiff_cache.inference.page import Figure, Page, Row, write_page


class Reader(HTMLParser):
    """Collects sources, text and the tags that were really opened."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_names_from_files_cannot_become_markup(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script> & "quotes".png'
    page = Page(
        title=evil,
        note=evil,
        rows=[Row(heading=evil, note=evil, figures=[Figure(file=tmp_path / "a b#?.png", caption=evil)])],
        legend=[(evil, (1, 2, 3))],
    )
    reader = Reader()
    reader.feed(write_page(page, tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "script" not in reader.tags
    assert "".join(reader.words).count(evil) == 7
    assert reader.sources == ["a%20b%23%3F.png"]


def test_the_page_links_only_files_below_its_folder(tmp_path: Path) -> None:
    figures = [Figure(file=tmp_path / "sub" / f"{n}.png", caption="c") for n in range(3)]
    text = write_page(
        Page(title="t", rows=[Row(heading="h", figures=figures)]), tmp_path / "index.html"
    ).read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.sources == ["sub/0.png", "sub/1.png", "sub/2.png"]
    assert "http" not in text
