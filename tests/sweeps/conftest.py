"""Small sweeps, and what to compare their runs by."""

from pathlib import Path
from typing import Any

from mmdiff_cache.config import TrainConfig
from tests.training.conftest import small_config

FILES = ("last.safetensors", "best.safetensors", "config.json")


def quick(store: Path, **changes: Any) -> TrainConfig:
    """A training of three steps whose samples come in one order, whatever its seed."""
    return small_config(store, **{"steps": 3, "order_seed": 0, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    """What a run computed, byte by byte; metrics also tell how fast it was."""
    return {name: (folder / name).read_bytes() for name in FILES}
