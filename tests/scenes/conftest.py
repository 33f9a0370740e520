"""Scenes rendered once for the tests of this folder."""

import pytest

from mmdiff_cache.scenes import Scene, render_scene


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    """120 scenes at 64 pixels, for whatever looks at pixels."""
    return [render_scene("train", index, 64) for index in range(120)]


@pytest.fixture(scope="session")
def many() -> list[Scene]:
    """500 scenes at 16 pixels, for statistics of objects and captions, which do not depend on the size."""
    return [render_scene("val", index, 16) for index in range(500)]
