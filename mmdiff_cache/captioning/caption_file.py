"""The file of captions: one line a picture, each durable when it is written, so that work can be stopped.

`FILE.jsonl` holds {sample_id, prompt} and nothing else, as `extract --prompts` reads it; how the captions
were made stands beside it in `FILE.jsonl.meta.json`.
"""

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from mmdiff_cache.datasets.prompts import parse_table
from mmdiff_cache.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def read_captions(path: Path) -> dict[str, str]:
    """The whole lines of a file by sample id; a last line that was cut is left out. Empty without a file.

    Raises ConfigError for a file of another name than .jsonl, DataError, with the line, for foreign content.
    """
    if path.suffix != ".jsonl":
        raise ConfigError(f"captions go to a file FILE.jsonl, got --out {path}")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    return parse_table(content[: _whole(content)], path)


class CaptionFile:
    """A file of captions that this process appends to, until it leaves the context."""

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        """Open or begin a file. `made_by` must be the same for all captions of a file.

        Raises ConfigError when it is not, or when another process writes the file.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115 - closed by __exit__
        try:
            _lock(self._file, path)
            content = path.read_bytes()
            whole = _whole(content)
            if whole < len(content):
                logger.warning("%s: the last line was cut when it was written, and is dropped", path)
                self._file.truncate(whole)
            _check_origin(path, made_by, begun=whole > 0)
        except BaseException:
            self._file.close()
            raise

    def add(self, sample_id: str, prompt: str) -> None:
        """Append one caption and make it durable."""
        line = json.dumps({"sample_id": sample_id, "prompt": prompt}, ensure_ascii=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "CaptionFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def meta_path(path: Path) -> Path:
    """Where a file's origin is written down."""
    return path.with_name(f"{path.name}.meta.json")


def _whole(content: bytes) -> int:
    """Bytes of the lines that end."""
    return content.rfind(b"\n") + 1


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{path} is being written by another process; wait for it") from error


def _check_origin(path: Path, made_by: Mapping[str, Any], *, begun: bool) -> None:
    """Captions of one file come from one model and one instruction; write down which before the first."""
    meta = meta_path(path)
    if begun:
        other = "choose another --out"
        try:
            stored: Any = json.loads(meta.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{path} has captions, but no {meta.name} says what made them; {other}"
            ) from None
        except ValueError as error:
            raise DataError(f"{meta} is not JSON ({error}); {other}") from error
        for name, asked in made_by.items():
            have = stored.get(name) if isinstance(stored, dict) else None
            if have != asked:
                raise ConfigError(f"{path} was made with {name} {have!r}, {asked!r} was asked; {other}")
        return
    aside = meta.with_name(f"{meta.name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(json.dumps(dict(made_by), indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, meta)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
