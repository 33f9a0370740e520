"""One small extraction, which tests vary."""

from pathlib import Path

import pytest

from mmdiff_cache.config import ExtractConfig


@pytest.fixture
def config(tiny_flux_folder: Path, tmp_path: Path) -> ExtractConfig:
    """Five scenes through a tiny FLUX, in three partitions of one batch each."""
    return ExtractConfig(
        backbone=str(tiny_flux_folder),
        store=str(tmp_path / "store"),
        splits=("val",),
        limit=5,
        resolution=64,
        batch_size=2,
        partition_size=2,
        layers=("double.1", "single.2"),
        timesteps=(0.5, 0.1),
        concepts={"two": ("near", "far")},
    )
