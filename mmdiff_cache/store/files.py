"""Files that survive a crash: write aside, make durable, rename, make the folder durable.

After a rename the name shows either all the old bytes or all the new ones. `os.fsync` before it keeps that
true when the power fails; the folder's own fsync makes the rename itself last.
"""

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

from mmdiff_cache.errors import MMDiffError, StorageError, StorageRefused

logger = logging.getLogger(__name__)

STAGING = "staging"
_OUR_NAME = re.compile(r"(file|text|[A-Za-z0-9_-]+-\d{6,})-\d+-[0-9a-f]{8}")
_REASONS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EIO: "input/output error of the device",
}
_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again; finished partitions are kept",
    errno.EDQUOT: "free some space and run the same command again; finished partitions are kept",
    errno.EFBIG: "the system limits the size of files (ulimit -f); finished partitions are kept",
    errno.EIO: "check the disk; finished partitions are kept, and the same command goes on from them",
}


@contextmanager
def storage_errors(path: Path) -> Generator[None]:
    """Turn the operating system's refusal into a StorageError that names the file and the remedy.

    What another folder would mend, a missing permission say, is a StorageRefused.
    """
    try:
        yield
    except MMDiffError:
        raise
    except OSError as error:
        code = error.errno or 0
        reason = _REASONS.get(code) or error.strerror or str(error)
        remedy = _REMEDIES.get(code, "choose a folder that can be written, with --store")
        kind = StorageError if code in _REMEDIES else StorageRefused
        raise kind(f"cannot write {error.filename or path}: {reason}; {remedy}") from error


def fsync_file(path: Path) -> None:
    """Make the content of a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folders(folders: Iterable[Path]) -> None:
    """Make the names in folders durable."""
    for folder in sorted(set(folders)):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_durably(root: Path, files: Mapping[str, bytes]) -> None:
    """Write whole files, by path below `root`, through its staging folder: nobody ever sees a part of one."""
    for name, data in files.items():
        make_folders((root / name).parent)
        aside = root / STAGING / f"file-{os.getpid()}-{secrets.token_hex(4)}"
        with open(aside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, root / name)
    fsync_folders((root / name).parent for name in files)


def make_folders(folder: Path) -> None:
    """Make a folder and those above it, durably."""
    made: list[Path] = []
    while not folder.is_dir():
        made.append(folder)
        folder = folder.parent
    for new in reversed(made):
        new.mkdir(exist_ok=True)
        fsync_folders([new.parent])


def staging_folder(root: Path, name: str) -> Path:
    """A new folder under staging/ that no other process uses."""
    folder = root / STAGING / f"{name}-{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def clear_staging(root: Path) -> None:
    """Remove what dead runs left in staging/. For the holder of the lock alone: nobody else writes then."""
    for entry in sorted((root / STAGING).iterdir()):
        if not _OUR_NAME.fullmatch(entry.name):
            logger.warning("%s was not made by mmdiff-cache and is left alone", entry)
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
