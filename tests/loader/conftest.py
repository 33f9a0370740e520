"""A store with everything that can be chosen from."""

from pathlib import Path

import pytest

from tests.learnable import make_rich_schema, write_store


@pytest.fixture(scope="session")
def rich_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training samples in four variants, with attention maps and an encoder."""
    return write_store(tmp_path_factory.mktemp("stores") / "rich", train=8, schema=make_rich_schema())
