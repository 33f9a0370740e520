"""Adds a label set to a store that is there: arrays and records of its own, nothing else is touched."""

import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.errors import ConfigError, DamageError, StoreError

from .arrays import arrays, filled_rows
from .files import clear_staging, sha256_file, storage_errors
from .growth import begin_growth, finish_growth, with_label
from .lock import StoreLock
from .manifest import Manifest, read_manifest
from .metadata import check_metadata
from .records import Partition, Record, SampleEntry, encode_record, read_record, record_path
from .schema import LabelArray
from .staging import Staging

logger = logging.getLogger(__name__)


class LabelSetWriter:
    """A label set that this process may write, until `close`. Use it as a context manager."""

    def __init__(self, root: Path, manifest: Manifest, name: str, lock: StoreLock) -> None:
        self.path, self.manifest, self.name, self._lock = root, manifest, name, lock

    def pending(self, split: str) -> list[Partition]:
        """The partitions without an intact record of this label set, or with files unlike it."""
        return [p for p in self.manifest.partitions(split) if not self._is_written(p)]

    def begin(self, partition: Partition) -> "LabelPartition":
        """Start writing the labels of a pending partition."""
        return LabelPartition(self.path, self.manifest, partition, self.name)

    def close(self) -> None:
        """Give the lock back; a second call does nothing."""
        self._lock.release()

    def __enter__(self) -> "LabelSetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_written(self, partition: Partition) -> bool:
        ids = self.manifest.splits[partition.split][partition.start : partition.stop]
        try:
            record = read_record(self.path, partition, self.manifest.fingerprint, ids, self.name)
            if record is None or record.stop < partition.stop:
                return False
            return all(sha256_file(self.path / entry.path) == entry.sha256 for entry in record.files)
        except (DamageError, OSError) as error:
            logger.warning("labels %s of %s will be written again: %s", self.name, partition.name, error)
            return False


class LabelPartition:
    """The labels of one partition in the making. Every slot must be written or failed before `commit`."""

    def __init__(self, root: Path, manifest: Manifest, partition: Partition, name: str) -> None:
        self.root, self.manifest, self.partition, self.name = root, manifest, partition, name
        self.ids = manifest.splits[partition.split][partition.start : partition.stop]
        folder = f"labels/{name}/"
        specs = arrays(manifest.schema, len(manifest.splits[partition.split]))
        own = {spec.path: spec for spec in specs if spec.path.startswith(folder)}
        self._rows = {path.removeprefix(folder): filled_rows(own[path], partition.size) for path in own}
        self._entries: dict[int, SampleEntry] = {}
        self._staging = Staging(root, partition, own)

    def write(
        self, offset: int, at_network_size: NDArray[Any], original: NDArray[Any], content_hash: str
    ) -> None:
        """The label of the sample `offset` behind the partition's start, [H W] and as distributed [H0 W0]."""
        rows, columns = original.shape
        self._rows["map"][offset] = at_network_size
        self._rows["original"][offset, :rows, :columns] = original
        self._rows["original_size"][offset] = rows, columns
        self._entries[offset] = SampleEntry(
            sample_id=self.ids[offset], state="done", content_hash=content_hash
        )

    def fail(self, offset: int, reason: str) -> None:
        """This sample has no such label; readers will say so."""
        text = reason.encode(errors="backslashreplace").decode()
        self._entries[offset] = SampleEntry(sample_id=self.ids[offset], state="failed", reason=text)

    def commit(self) -> Record:
        """Move the files into the store, then write the record. Raises StoreError while slots are open."""
        if len(self._entries) < self.partition.size:
            raise StoreError(f"labels {self.name} of {self.partition.name} are not complete")
        with storage_errors(self.root):
            for name, values in self._rows.items():
                self._staging.rows(f"labels/{self.name}/{name}", values)
            record = Record(
                split=self.partition.split,
                partition=self.partition.index,
                start=self.partition.start,
                stop=self.partition.stop,
                identity=self.manifest.fingerprint,
                samples=tuple(self._entries[n] for n in range(self.partition.size)),
                files=self._staging.files,
                label_set=self.name,
            )
            self._staging.publish(record_path(self.partition, self.name), encode_record(record))
        return record

    def __enter__(self) -> "LabelPartition":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staging.remove()


def open_label_writer(path: str | os.PathLike[str], label: LabelArray) -> LabelSetWriter:
    """Open a store for one more label set, or go on with it.

    Raises ConfigError for a name that is taken by labels of another meaning, StoreError when the folder is no
    store or is being written by someone else, StorageError when it cannot be written.
    """
    root, name = Path(path), label.spec.name
    read_manifest(root)
    with storage_errors(root):
        lock = StoreLock(root)
    try:
        with storage_errors(root):
            clear_staging(root)
            finish_growth(root)
        manifest = read_manifest(root)
        check_metadata(root, manifest)
        stored = next((known for known in manifest.schema.labels if known.spec.name == name), None)
        if stored is None:
            with storage_errors(root):
                manifest = begin_growth(root, with_label(manifest, label))
        elif not stored.added or stored.spec != label.spec:
            raise ConfigError(f"{root} has other labels called {name!r} ({stored.spec}); choose another name")
        elif np.any(np.array(label.canvas) > stored.canvas):
            raise ConfigError(
                f"labels {name!r} of {root} hold at most {list(stored.canvas)} pixels, got "
                f"{list(label.canvas)}; choose another name"
            )
    except BaseException:
        lock.release()
        raise
    return LabelSetWriter(root, manifest, name, lock)
