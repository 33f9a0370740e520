"""A small world on the tiny backbone, carried out once for all tests that look at what came of it."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from mmdiff_cache.experiments.world import World, make_world
from mmdiff_cache.records import Progress


@contextmanager
def no_bar(verb: str) -> Generator[Progress]:
    """A progress display that shows nothing."""

    def advance(done: int, total: int, state: str) -> None:
        assert 0 <= done <= total, (verb, state)

    yield advance


@pytest.fixture
def bar() -> Callable[[str], AbstractContextManager[Progress]]:
    return no_bar


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stores go by default."""
    monkeypatch.setenv("MMDIFF_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def small(tiny_flux_folder: Path, tiny_dinov3_folder: Path) -> World:
    """Four scenes a split, two steps, one seed."""
    return make_world(
        datasets=["scenes"],
        backbones=[str(tiny_flux_folder)],
        encoder=str(tiny_dinov3_folder),
        limit=4,
        quick=True,
        settings={"aggregator.width": "8", "aggregator.depth": "1", "aggregator.heads": "2"},
    )
