"""What earlier runs measured, as the only ground on which a plan estimates time and compressed size.

Every run leaves `logs/measured.json` in its store. A plan takes the figures of its own store, else those of
any store under data/ that was made by the same backbone on the same kind of machine, and names the file.
"""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmdiff_cache.config import Config, ExtractConfig, data_folder, filled
from mmdiff_cache.errors import ConfigError

FILE = "logs/measured.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured(Config):
    """Speed and size of one run."""

    dataset: str
    backbone: str
    dtype: str
    machine: str
    resolution: int
    batch_size: int
    codec: str
    beside: tuple[str, ...] = ()
    """What ran beside the transformer's own passes; see `beside`."""
    samples: int
    """Samples that were extracted, loading not counted."""
    operations_per_second: float
    """Operations of the transformer (cost.forward_operations) over the time of the whole run."""
    bytes_ratio: float
    """Hidden states in float16 over their bytes on disk."""
    others_ratio: float
    """The same of all other arrays: pictures, labels, concept scores ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number and where it is from."""

    value: float
    source: str


def device_type(device: str) -> str:
    """`cpu` or `cuda`, whichever a device's name comes to on this machine."""
    import torch  # half a second that only an estimate should pay

    return "cuda" if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()) else "cpu"


def machine_of(device: str) -> str:
    """What `auto`, `cpu`, `cuda` or `cuda:1` stands for: a GPU's name, or `cpu, 2 threads`."""
    import torch

    if device_type(device) == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    there = torch.cuda.is_available()
    return torch.cuda.get_device_name(None if device == "auto" else device) if there else "cuda"


def beside(config: ExtractConfig) -> tuple[str, ...]:
    """What takes time beside the transformer's passes and is not counted in their operations."""
    words = [f"{len(vocabulary)} concepts" for vocabulary in (config.concepts or {}).values()]
    attention = ["cross-attention"] if config.cross_attention else []
    drawn = [] if config.generation is None else [f"drawn, {config.generation.mode}"]
    return (*sorted(words), *attention, *config.discriminative, *drawn)


def known_speed(config: ExtractConfig, machine: str) -> Figure | None:
    """Operations a second of a resolved configuration, by an earlier run of the same batches and company."""
    for file, found in _measurements(config):
        same = (found.backbone, found.dtype, found.machine, found.resolution, found.batch_size, found.beside)
        here = (config.backbone, config.dtype, machine, config.resolution, config.batch_size, beside(config))
        if same == here:
            return Figure(value=found.operations_per_second, source=str(file))
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratios:
    """Raw to stored bytes, and where they are from."""

    hidden_states: float
    others: float
    """1 where nothing of the same data set was measured."""
    source: str


def known_ratios(config: ExtractConfig) -> Ratios | None:
    """What an earlier run found to be left of its arrays; None if there is none."""
    for file, found in _measurements(config):
        if (found.backbone, found.dtype, found.codec) == (config.backbone, config.dtype, config.codec):
            others = found.others_ratio if found.dataset == config.dataset else 1.0
            return Ratios(hidden_states=found.bytes_ratio, others=others, source=str(file))
    return None


def keep_measured(store: Path, measured: Measured) -> None:
    """Leave the figures of a run in its store; a failure costs only that."""
    try:
        (store / FILE).write_text(json.dumps(measured.to_json(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("the run's speed was not kept: %s", error)


def _measurements(config: ExtractConfig) -> Iterator[tuple[Path, Measured]]:
    own = Path(filled(config.store)) / FILE
    others = sorted(path for path in data_folder().glob(f"*/*/{FILE}") if os.path.abspath(path) != str(own))
    for file in (own, *others):
        try:
            measured = Measured.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, TypeError, AttributeError, ConfigError):
            continue  # not there, or damaged: it is worth an estimate, not an error
        if min(measured.operations_per_second, measured.bytes_ratio, measured.others_ratio) > 0:
            yield file, measured
