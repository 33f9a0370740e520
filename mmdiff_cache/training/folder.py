"""The folder of a run: claimed once, locked while it is trained, with its log and its metrics.

runs/depth-scenes-flux-scenes-1/
    config.json         the resolved configuration; `train --config` takes it back
    environment.json    versions, commit, device, threads; `later` where it went on with others
    store.json          the manifest of the store: all that `predict` has to know about it
    metrics.jsonl       one line each: losses, and scores on the held-out samples
    train.log
    tensorboard/        the same numbers as curves
    pictures/           step-000480.jpg: the first held-out samples at every check
    last.safetensors    everything needed to go on
    best.safetensors    the averaged weights that scored best on the held-out samples
"""

import errno
import fcntl
import json
import logging
import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.training.checkpoint import BEST, partial_name, refusal, write_bytes

RUNS = Path("runs")
CONFIG, ENVIRONMENT, METRICS, LOG = "config.json", "environment.json", "metrics.jsonl", "train.log"
STORE, BOARD, PICTURES = "store.json", "tensorboard", "pictures"


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
            raise refusal(f"the run folder {folder}", error) from error
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
        raise refusal(f"the run folder {folder}", error) from error
    foreign = sorted(set(entries) - {LOG, partial_name(CONFIG)})  # these come before the configuration
    if foreign and not _of_training(folder / CONFIG):
        raise ConfigError(
            f"{folder} is not empty and holds no run (it has {foreign[0]!r}); choose another --run"
        )
    return CONFIG in entries


def _of_training(config: Path) -> bool:
    """Whether a file is the configuration of a training: models of other libraries have a config.json too."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"task", "stores", "run"} <= values.keys()


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


_at_work: ContextVar[Path | None] = ContextVar("at_work", default=None)
"""The run whose lines these are; None for what belongs to all of the process."""


@contextmanager
def working(folder: Path) -> Generator[None]:
    """What is logged is this run's alone, and stands in no other run's log."""
    token = _at_work.set(folder)
    try:
        yield
    finally:
        _at_work.reset(token)


class _LogFile(logging.FileHandler):
    """A log that a full disk costs lines, without a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Leave the line out."""


@contextmanager
def logging_to(path: Path) -> Generator[None]:
    """Write the package's log to a file as well. Raises StorageRefused where no file can be made."""
    package = logging.getLogger("mmdiff_cache")
    try:
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise refusal(str(path), error) from error
    handler.addFilter(lambda record: _at_work.get() in (None, path.parent))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(min(package.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        with suppress(OSError):  # what a full disk did not take
            handler.close()


def append_metrics(folder: Path, line: Mapping[str, Any]) -> None:
    """Add one line to the metrics, whole or not at all. Raises StorageError when the file system refuses."""
    path = folder / METRICS
    try:
        with open(path, "ab", buffering=0) as file:
            before, content = file.tell(), (json.dumps(line) + "\n").encode()
            try:
                written = file.write(content)
                if written != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise refusal(str(path), error) from error


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
    path = folder / METRICS
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    content = "".join(json.dumps(line) + "\n" for line in kept).encode()
    if path.exists() and path.read_bytes() != content:
        write_bytes(path, content)


def clear_partial(folder: Path) -> None:
    """Take away what a killed training was just writing. For the holder of the lock alone."""
    _remove(folder.glob(partial_name("*")))


def clear_start(folder: Path) -> None:
    """Take away what a training left that was stopped before its first checkpoint; it starts anew."""
    _remove([folder / METRICS, folder / BEST, *(folder / PICTURES).rglob("step-*.jpg")])


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise refusal(str(file), error) from error
