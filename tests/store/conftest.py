"""A finished store that many tests read, written once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmdiff_cache.store.manifest import Manifest
from tests.store.synthetic import make_manifest, write_store


@pytest.fixture(scope="session", autouse=True)
def quick_fsync() -> Iterator[None]:
    """A test's disk need not survive a power cut; that fsync is called, and when, is test_kill's to check."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    return make_manifest()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> Path:
    """6 + 3 samples, two variants, two vocabularies, three label sets, partitions of four. Read only."""
    path = tmp_path_factory.mktemp("stores") / "finished"
    write_store(path, manifest)
    return path
