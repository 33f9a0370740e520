"""One small store made by the real extraction, and a run of each task trained on it."""

from pathlib import Path

import pytest

from mmdiff_cache.config import ExtractConfig, TrainConfig
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.store.reader import Store
from mmdiff_cache.training.run import Run, train

TASKS = ("segmentation", "saliency", "depth")
BATCH = 4


@pytest.fixture(scope="session")
def scenes_store(tmp_path_factory: pytest.TempPathFactory, tiny_flux_folder: Path) -> Store:
    """Six training and six test scenes of 32 pixels; the test split does not fill its last batch."""
    return extract(
        ExtractConfig(
            dataset="scenes",
            splits=("train", "test"),
            limit=6,
            resolution=32,
            batch_size=BATCH,
            partition_size=BATCH,
            backbone=str(tiny_flux_folder),
            layers=("single.1", "double.1", "single.3"),
            store=str(tmp_path_factory.mktemp("stores") / "scenes"),
        )
    )


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, scenes_store: Store) -> dict[str, Run]:
    """A few steps of every task; depth uses only some of the stored layers and timesteps."""
    folder = tmp_path_factory.mktemp("runs")
    some = {"depth": {"layers": ("single.3", "double.1"), "timesteps": (0.001, 0.52)}}
    return {
        task: train(
            TrainConfig(
                task=task,
                stores=(str(scenes_store.path),),
                run=str(folder / task),
                steps=3,
                batch_size=2,
                learning_rate=3e-3,
                **some.get(task, {}),
            )
        )
        for task in TASKS
    }
