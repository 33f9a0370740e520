"""What differs between configurations: by dotted names, as columns of a table and as names of folders."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdiff_cache.config import TrainConfig

PLACES = ("run", "device", "compile", "memory")
"""Fields that say where and how a run takes place, not what it computes."""
SEEDS = ("seed", "order_seed")
"""Fields over which a table takes its mean."""
SLUG_LENGTH = 80
HASH_LENGTH = 8
ALL_ALIKE = "run"
"""Slug of runs that differ in nothing."""


def flat(config: TrainConfig) -> dict[str, Any]:
    """All fields by dotted names, such as `aggregator.width`."""
    return dict(_flattened("", config.to_json()))


def _flattened(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        pairs += (
            _flattened(f"{prefix}{name}.", value) if isinstance(value, dict) else [(prefix + name, value)]
        )
    return pairs


def differing(configs: Sequence[TrainConfig]) -> tuple[str, ...]:
    """Dotted names of the fields that are not the same in all, in the order of the configuration."""
    rows = [flat(config) for config in configs]
    names = dict.fromkeys(name for row in rows for name in row)
    return tuple(
        name for name in names if name not in PLACES and len({json.dumps(row.get(name)) for row in rows}) > 1
    )


def show(name: str, value: Any) -> str:
    """A value in a table: lists joined by commas, stores by the last two parts of their path."""
    if value is None:
        return "-"
    if name == "stores":
        return ",".join("/".join(Path(path).parts[-2:]) for path in value)
    if isinstance(value, list):
        return ",".join(show("", item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def slug(config: TrainConfig, names: Sequence[str]) -> str:
    """What differs, as part of a folder's name."""
    values = flat(config)
    words = [f"{name.rsplit('.', 1)[-1]}-{show(name, values.get(name))}" for name in names]
    return re.sub(r"[^A-Za-z0-9.,_-]+", "-", "_".join(words))[:SLUG_LENGTH].strip("-._") or ALL_ALIKE


def digest(config: TrainConfig, without: Sequence[str] = ()) -> str:
    """A short hash of a resolved configuration: the same for the same training, wherever it takes place.

    Fields at their default do not count, so that a later release with a new field finds its runs again.
    """
    plain, skipped = flat(TrainConfig(task="")), {*PLACES, *without}
    counted = {
        name: value
        for name, value in flat(config).items()
        if name not in skipped and value != plain.get(name)
    }
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:HASH_LENGTH]
