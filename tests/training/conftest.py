"""Small trainings that other tests read: one a task, on features that show the labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmdiff_cache.config import AggregatorConfig, TrainConfig
from mmdiff_cache.training.run import Run, train

TINY = AggregatorConfig(width=16, depth=1, heads=2, mlp_ratio=1.0)


def small_config(store: Path, run: Path | None = None, **changes: Any) -> TrainConfig:
    """A training of a second: a linear probe on a tiny aggregator, at a rate at which it learns in a few
    dozen steps.
    """
    values: dict[str, Any] = {
        "task": "segmentation",
        "stores": (str(store),),
        "run": None if run is None else str(run),
        "aggregator": TINY,
        "decoder": "linear",
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 2e-2,
        "decoder_rate": 1.0,
    }
    return TrainConfig(**{**values, **changes})


@pytest.fixture(scope="session")
def trained(learnable_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A finished run of a task, trained once for all tests; they must not change it."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}

    def get(task: str) -> Run:
        if task not in runs:
            runs[task] = train(small_config(learnable_store, folder / task, task=task, steps=40))
        return runs[task]

    return get
