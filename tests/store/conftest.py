"""A finished store that many tests read, written once."""

from pathlib import Path

import pytest

from mmdiff_cache.store.manifest import Manifest
from tests.store.synthetic import make_manifest, write_store


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    return make_manifest()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> Path:
    """6 + 3 samples, two variants, two vocabularies, three label sets, partitions of four. Not to be changed."""
    path = tmp_path_factory.mktemp("stores") / "finished"
    write_store(path, manifest)
    return path
