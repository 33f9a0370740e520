"""Opens a store for writing: takes the lock, creates or checks, says what is left, begins partitions."""

import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numcodecs.blosc

from mmdiff_cache.errors import ConfigError, DamageError, StoreError

from .files import clear_staging, make_folders, storage_errors, write_durably
from .growth import begin_growth, finish_growth, with_samples_of
from .lock import StoreLock
from .manifest import (
    MANIFEST,
    Difference,
    Manifest,
    compare,
    encode_manifest,
    free_name,
    read_manifest,
    with_metadata,
)
from .metadata import check_metadata, split_files
from .partition import PartitionWriter
from .records import Partition, Record, first_fault, read_record

logger = logging.getLogger(__name__)

FOLDERS = ("partitions", "staging", "failures", "logs")


class StoreWriter:
    """A store that this process may write, until `close`. Use it as a context manager."""

    def __init__(self, root: Path, manifest: Manifest, asked: Manifest, lock: StoreLock) -> None:
        self.path, self.manifest, self.asked, self._lock = root, manifest, asked, lock

    def pending(self, split: str) -> list[Partition]:
        """The partitions that hold asked samples and have no valid record, in order.

        A record whose files are missing or cut, or that cannot be read, counts as absent, with a warning.
        """
        if split not in self.asked.splits:
            raise ConfigError(
                f"split {split!r} was not planned for {self.path}; planned: {', '.join(self.asked.splits)}"
            )
        asked = len(self.asked.splits[split])
        planned = [p for p in self.manifest.partitions(split) if p.start < asked]
        return [p for p in planned if valid_record(self.path, self.manifest, p) is None]

    def begin(self, partition: Partition) -> PartitionWriter:
        """Start writing one of the pending partitions."""
        if partition not in self.manifest.partitions(partition.split):
            raise ConfigError(f"{partition} is not a partition of {self.path}")
        return PartitionWriter(self.path, self.manifest, partition)

    def close(self) -> None:
        """Give the lock back; a second call does nothing."""
        self._lock.release()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_writer(path: str | os.PathLike[str], manifest: Manifest, *, append: bool = False) -> StoreWriter:
    """Open the store at `path` for what `manifest` asks: create it, or go on with it when it is the same.

    A store that holds all that is asked, and more, opens with nothing pending. With `append`, samples and
    splits that are asked and not planned yet are added behind those that are; a last partition that becomes
    longer is pending as a whole, and stays readable until it is written again. Raises StoreError when the
    folder is no store, holds another identity or lacks what is asked, or is being written by someone else;
    StorageError when it cannot be written. A folder with foreign files is left untouched.
    """
    root = Path(path)
    numcodecs.blosc.use_threads = False  # with threads, a chunk's bytes depend on how many there are
    with storage_errors(root):
        _check_folder(root)
        make_folders(root)
        lock = StoreLock(root)
    try:
        with storage_errors(root):
            for folder in FOLDERS:
                make_folders(root / folder)
            clear_staging(root)
            finish_growth(root)
        if (root / MANIFEST).exists():
            stored = read_manifest(root)
            check_metadata(root, stored)
            larger = with_samples_of(stored, manifest) if append else stored
            writer = StoreWriter(root, larger, manifest, lock)
            _check_fit(writer, compare(larger, manifest))
            if larger != stored:
                with storage_errors(root):
                    writer.manifest = begin_growth(root, larger)
        else:
            with storage_errors(root):
                writer = StoreWriter(root, _create(root, manifest), manifest, lock)
        _log(root, manifest)
    except BaseException:
        lock.release()
        raise
    return writer


def valid_record(root: Path, manifest: Manifest, partition: Partition) -> Record | None:
    """The record of a whole partition whose files are all there; None where it must be written (again)."""
    ids = manifest.splits[partition.split][partition.start : partition.stop]
    try:
        record = read_record(root, partition, manifest.fingerprint, ids)
    except DamageError as error:
        logger.warning("partition %s will be written again: %s", partition.name, error)
        return None
    if record is None:
        return None
    fault = first_fault(root, record)
    if fault is not None:
        logger.warning("partition %s will be written again: %s", partition.name, fault)
    return record if fault is None and record.stop == partition.stop else None


def _check_folder(root: Path) -> None:
    """Refuse what is no folder, and a folder without manifest that holds anything but our own beginnings."""
    if root.exists() and not root.is_dir():
        raise StoreError(
            f"{root} is a file; a store is a folder: choose another one, e.g. --store {free_name(root)}"
        )
    if not root.is_dir() or (root / MANIFEST).exists():
        return
    for entry in sorted(root.iterdir()):
        if entry.name not in (*FOLDERS, "lock") and not entry.name.endswith(".zarr"):
            raise StoreError(
                f"{root} is no store and not empty (it has {entry.name!r}); choose another folder, "
                f"e.g. --store {free_name(root)}"
            )


def _create(root: Path, manifest: Manifest) -> Manifest:
    """Write the metadata of all splits, then the manifest: from then on the folder is a store."""
    files = {p: data for split in manifest.splits for p, data in split_files(manifest, split).items()}
    for leftover in _leftovers(root):
        relative = leftover.relative_to(root).as_posix()
        if relative not in files or leftover.read_bytes() != files[relative]:
            raise StoreError(
                f"{root} has data but no {MANIFEST} ({relative}); restore it, or choose another folder, "
                f"e.g. --store {free_name(root)}"
            )
    write_durably(root, files)
    complete = with_metadata(manifest, files)
    write_durably(root, {MANIFEST: encode_manifest(complete)})
    return complete


def _leftovers(root: Path) -> Iterator[Path]:
    """Files of a creation that did not reach its manifest, or of a store that lost it."""
    for group in (*sorted(root.glob("*.zarr")), root / "partitions"):
        yield from (entry for entry in sorted(group.rglob("*")) if not entry.is_dir())


def _check_fit(writer: StoreWriter, differences: list[Difference]) -> None:
    """Refuse what does not fit; a provenance that differs is only worth a warning."""
    root, hard = writer.path, [d for d in differences if d.part in ("identity", "contents", "data")]
    other = f"choose another folder, e.g. --store {free_name(root)}"
    longer = [d for d in hard if d.field.startswith("samples of ")]
    if hard and hard == longer:
        raise StoreError(
            f"{root} was planned with fewer samples: {longer[0]}; add the new ones with --append, or {other}"
        )
    if hard:
        more = f" (and {len(hard) - 1} more: {', '.join(d.field for d in hard[1:])})" if len(hard) > 1 else ""
        raise StoreError(f"{root} does not hold what is asked: {hard[0].part} {hard[0]}{more}; {other}")
    beyond = [
        p.name for split in writer.asked.splits for p in writer.pending(split) if not _can_finish(writer, p)
    ]
    if beyond:
        layout = next((d for d in differences if d.part == "layout"), None)
        raise StoreError(
            f"{root} is not finished ({beyond[0]} is the first of {len(beyond)} partitions left) and was "
            f"planned for other contents than asked{f': {layout}' if layout else ''}; "
            f"finish it with the configuration in its {MANIFEST}, or {other}"
        )
    for difference in differences:
        if difference.part == "provenance":
            logger.warning("%s was begun elsewhere or otherwise: %s", root, difference)


def _can_finish(writer: StoreWriter, partition: Partition) -> bool:
    """Whether a run of what is asked gives exactly the values that the stored plan has for this partition."""
    asked = len(writer.asked.splits[partition.split])
    return writer.asked.schema == writer.manifest.schema.extracted and partition.stop <= asked


def _log(root: Path, asked: Manifest) -> None:
    """Note who opened the store and when: times stay out of manifest and records."""
    note: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "pid": os.getpid(),
        "host": platform.node(),
        "provenance": asked.provenance,
    }
    try:
        with open(root / "logs" / "writers.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")
    except OSError as error:
        logger.warning("cannot note this run in %s: %s", root / "logs", error)
