"""What every test runs under: one thread a process, sleeping OpenMP threads, and no model hub."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tiny_flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved FluxPipeline of the real classes at tiny size: 2 double and 4 single blocks, 32 px, 4 x 4 tokens."""
    from tests.tiny_flux import save_tiny_flux

    return save_tiny_flux(tmp_path_factory.mktemp("backbones") / "tiny-flux")
