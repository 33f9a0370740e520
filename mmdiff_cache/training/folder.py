"""The folder of a run: claimed once, locked while it is trained, with its log and its metrics.

runs/depth-scenes-flux-scenes-1/
    config.json         the resolved configuration; `train --config` takes it back
    environment.json    versions, device, threads
    store.json          the manifest of the store: all that `predict` has to know about it
    metrics.jsonl       one line each: losses, and scores on the held-out samples
    train.log
    last.safetensors    everything needed to go on
    best.safetensors    the averaged weights that scored best on the held-out samples
"""

import fcntl
import json
import logging
import os
import platform
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmdiff_cache.errors import ConfigError, StorageRefused

RUNS = Path("runs")
CONFIG, ENVIRONMENT, METRICS, LOG = "config.json", "environment.json", "metrics.jsonl", "train.log"
STORE = "store.json"
PACKAGES = ("mmdiff-cache", "torch", "numpy", "safetensors", "zarr", "numcodecs")


def new_folder(name: str, runs: Path = RUNS) -> Path:
    """Make runs/<name>-<n> with the first free number; two trainings never get the same one."""
    number = 1
    while True:
        folder = runs / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise _refused(folder, error) from error
        else:
            return folder.absolute()


def open_folder(folder: Path) -> bool:
    """Make a named run folder, or find it; say whether it has a run. ConfigError if it has something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = [entry.name for entry in folder.iterdir()]
    except FileExistsError:
        raise ConfigError(f"{folder} is a file; a run is a folder: choose another --run") from None
    except OSError as error:
        raise _refused(folder, error) from error
    if entries and CONFIG not in entries:
        raise ConfigError(
            f"{folder} is not empty and holds no run (it has {sorted(entries)[0]!r}); choose another --run"
        )
    return bool(entries)


def _refused(folder: Path, error: OSError) -> StorageRefused:
    return StorageRefused(
        f"cannot make the run folder {folder}: {error.strerror or error}; choose another with --run"
    )


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold the folder for one training. Raises ConfigError if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is being trained by another process; wait for it or choose another --run"
            ) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def logging_to(path: Path) -> Generator[None]:
    """Write the package's log to a file as well."""
    package = logging.getLogger("mmdiff_cache")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(min(package.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()


def environment(device: str) -> dict[str, Any]:
    """What a result may depend on besides the configuration."""
    on_gpu = device.startswith("cuda")
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
    }


def append_metrics(folder: Path, line: Mapping[str, Any]) -> None:
    """Add one line to the metrics."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of the metrics, oldest first; a last line that a crash cut short is left out."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    values: list[dict[str, Any]] = []
    for line in lines:
        try:
            values.append(json.loads(line))
        except ValueError:
            break
    return values


def cut_metrics(folder: Path, step: int) -> None:
    """Drop the lines behind a step: a training that goes on from there writes them again."""
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
