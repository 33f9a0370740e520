"""Writes one partition: hidden states sample by sample, small arrays at the end, the record last.

Everything is staged and made durable first. Only `commit` touches the store, in an order that lets a kill at
any moment leave either no record or a true one.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from mmdiff_cache.errors import DamageError, DataError, StoreError
from mmdiff_cache.records import FeatureBatch, PreparedSample, noise_key

from .arrays import ArraySpec, arrays
from .checks import check_batch, feature_arrays, sample_fault
from .files import fsync_file, fsync_folders, sha256_file, staging_folder, storage_errors, write_durably
from .manifest import Manifest
from .metadata import chunk_key
from .quantise import quantise
from .records import (
    FileEntry,
    Partition,
    Record,
    SampleEntry,
    encode_record,
    read_record,
    record_path,
)
from .shard_writer import write_shard
from .shards import ShardLayout, parse_layout
from .threads import codec_pool


class PartitionWriter:
    """One partition in the making. Every slot must be written or failed before `commit`.

    Used as a context manager it removes what it staged when it is left without a commit. It holds no lock:
    the `StoreWriter` that began it does, so it can also work in another process for that writer.
    Memory: the partition's small arrays and one sample's hidden states.
    """

    def __init__(self, root: Path, manifest: Manifest, partition: Partition) -> None:
        self.root, self.manifest, self.partition = root, manifest, partition
        self.ids = manifest.splits[partition.split][partition.start : partition.stop]
        specs = arrays(manifest.schema, len(manifest.splits[partition.split]))
        self._specs = {spec.path: spec for spec in specs if spec.reach != "array"}
        self._buffers = {
            p: _filled(s, partition.size) for p, s in self._specs.items() if s.reach == "partition"
        }
        self._buffers["sample_id"][:] = self.ids
        self._entries: list[SampleEntry | None] = [None] * partition.size
        self._files: dict[str, FileEntry] = {}
        self._staged: dict[str, zarr.Array[Any]] = {}
        self._shards: ShardLayout | None = None
        with storage_errors(root):
            self._staging = staging_folder(root, partition.name)

    def write(self, offset: int, samples: Sequence[PreparedSample], features: FeatureBatch) -> None:
        """Store consecutive samples, the first of them `offset` samples behind the partition's start.

        A sample whose features are not finite, or whose picture or labels do not fit the schema, is recorded
        as failed with the reason and keeps its slot. Raises StoreError when the batch does not belong here
        (ids, shapes, dtypes, a slot that is taken) and StorageError when the disk refuses.
        """
        self._check_slots(offset, [sample.sample_id for sample in samples])
        check_batch(self._specs, features, len(samples))
        for number, sample in enumerate(samples):
            row = {path: array[number] for path, array in feature_arrays(features).items()}
            reason = sample_fault(self.manifest.schema, sample, row)
            if reason is not None:
                self.fail(offset + number, sample.sample_id, reason)
                continue
            self._stage_hidden_states(offset + number, row.pop("hidden_states"))
            self._keep(offset + number, sample, row)

    def fail(self, offset: int, sample_id: str, reason: str) -> None:
        """Give up one sample: it keeps its slot, and every reader will name it with the reason."""
        self._check_slots(offset, [sample_id])
        text = reason.encode(errors="backslashreplace").decode()
        self._entries[offset] = SampleEntry(sample_id=sample_id, state="failed", reason=text)

    def commit(self) -> Record:
        """Move all files into the store, then write the record. Raises StoreError while slots are open."""
        entries = tuple(entry for entry in self._entries if entry is not None)
        if len(entries) < self.partition.size:
            missing = self.ids[self._entries.index(None)]
            raise StoreError(
                f"partition {self.partition.name} cannot be recorded: {missing!r} was never written"
            )
        with storage_errors(self.root):
            self._stage_small_arrays()
            record = Record(
                split=self.partition.split,
                partition=self.partition.index,
                start=self.partition.start,
                stop=self.partition.stop,
                identity=self.manifest.fingerprint,
                samples=entries,
                files=tuple(self._files[path] for path in sorted(self._files)),
            )
            self._check_kept(record)
            self._withdraw()
            self._publish(record)
            write_durably(self.root, {record_path(self.partition): encode_record(record)})
            shutil.rmtree(self._staging)
        return record

    def abort(self) -> None:
        """Remove what was staged. The store itself was not touched."""
        shutil.rmtree(self._staging, ignore_errors=True)

    def __enter__(self) -> "PartitionWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _check_slots(self, offset: int, ids: Sequence[str]) -> None:
        """Rows must never belong to another sample: the ids must be those of the plan, in its order."""
        planned = list(self.ids[offset : offset + len(ids)])
        if offset < 0 or planned != list(ids):
            raise StoreError(
                f"partition {self.partition.name} has samples {planned} at offset {offset}, got {list(ids)}"
            )
        for number, sample_id in enumerate(ids, start=offset):
            if self._entries[number] is not None:
                raise StoreError(
                    f"sample {sample_id!r} of partition {self.partition.name} was already written"
                )

    def _stage_hidden_states(self, offset: int, values: NDArray[np.float16]) -> None:
        """One shard a variant; `values` is [V T L h w C]."""
        sample = self.partition.start + offset
        with storage_errors(self.root):
            layout = self._layout()
            for variant, maps in enumerate(values):
                key = chunk_key(self._specs["hidden_states"], sample, variant)
                name = f"{self.partition.split}.zarr/{key}"
                stored = self._quantised(offset, variant, maps) if layout.dtype == np.int8 else maps
                self._files[name] = write_shard(
                    self._staging, name, layout, stored.reshape(layout.shard), codec_pool()
                )

    def _quantised(self, offset: int, variant: int, maps: NDArray[np.float16]) -> NDArray[np.int8]:
        """The maps [T L h w C] of one variant as whole numbers; their scales go to the small arrays."""
        steps = np.empty(maps.shape, np.int8)
        for position in np.ndindex(*maps.shape[:2]):
            steps[position], scale = quantise(maps[position])
            self._buffers["hidden_states_scale"][(offset, variant, *position)] = scale
        return steps

    def _layout(self) -> ShardLayout:
        """How shards of hidden states are encoded; makes their folder in staging the first time."""
        if self._shards is None:
            folder = f"{self.partition.split}.zarr/hidden_states"
            self._shards = parse_layout((self.root / folder / "zarr.json").read_bytes())
            if self._shards is None:
                raise StoreError(f"{self.root / folder} has codecs that this mmdiff-cache cannot write")
            (self._staging / folder).mkdir(parents=True)
        return self._shards

    def _keep(self, offset: int, sample: PreparedSample, row: dict[str, NDArray[Any]]) -> None:
        """Put a sample's small values into the partition's buffers."""
        for path, values in row.items():
            self._buffers[path][offset] = values
        self._buffers["images"][offset] = sample.image
        self._buffers["prompt"][offset] = sample.prompt
        for variant, setting in enumerate(self.manifest.schema.variants):
            key = noise_key(self.manifest.seed, sample.sample_id, setting.noise_draw)
            self._buffers["noise_key"][offset, variant] = key
        for label in self.manifest.schema.labels:
            name = label.spec.name
            rows, columns = sample.original_labels[name].shape
            self._buffers[f"labels/{name}/map"][offset] = sample.labels[name]
            self._buffers[f"labels/{name}/original"][offset, :rows, :columns] = sample.original_labels[name]
            self._buffers[f"labels/{name}/original_size"][offset] = rows, columns
        self._entries[offset] = SampleEntry(
            sample_id=sample.sample_id, state="done", content_hash=sample.content_hash
        )

    def _stage_small_arrays(self) -> None:
        for path, buffer in self._buffers.items():
            where = np.s_[self.partition.start : self.partition.stop]
            self._stage(path, (self.partition.index,), where, buffer)

    def _stage(self, path: str, position: tuple[int, ...], where: Any, values: NDArray[Any]) -> None:
        """Write one shard of an array into staging, durably, and note its size and hash."""
        if path not in self._staged:
            self._staged[path] = self._staged_array(path)
        self._staged[path].set_basic_selection(where, values)
        name = f"{self.partition.split}.zarr/{chunk_key(self._specs[path], *position)}"
        file = self._staging / name
        fsync_file(file)
        self._files[name] = FileEntry(path=name, size=file.stat().st_size, sha256=sha256_file(file))

    def _staged_array(self, path: str) -> "zarr.Array[Any]":
        """A copy of an array's metadata in staging: what is written gets the store's keys and codecs."""
        name = f"{self.partition.split}.zarr/{path}"
        folder = self._staging / name
        folder.mkdir(parents=True)
        shutil.copyfile(self.root / name / "zarr.json", folder / "zarr.json")
        # open_array ignores a config of its own; without this a shard of nothing but fill is not written
        with zarr.config.set({"array.write_empty_chunks": True}):
            return zarr.open_array(folder, mode="r+", zarr_format=3)

    def _check_kept(self, record: Record) -> None:
        """Refuse to replace what is there by less: a finished sample must be had again, and be the same."""
        try:
            old = read_record(self.root, self.partition, self.manifest.fingerprint, self.ids)
        except DamageError:
            return
        for before, now in zip(() if old is None else old.samples, record.samples, strict=False):
            if before.state == "done" and now.content_hash != before.content_hash:
                what = f"cannot be had again ({now.reason})" if now.reason else "is another picture by now"
                raise DataError(
                    f"sample {now.sample_id!r} was finished before and {what}; nothing was changed: bring "
                    f"back its source, or delete {self.root / record_path(self.partition)} to give it up"
                )

    def _withdraw(self) -> None:
        """Before files are replaced: take back an older record, and the shards of samples that fail now."""
        old = self.root / record_path(self.partition)
        if old.exists():
            old.unlink()
            fsync_folders([old.parent])
        for number, entry in enumerate(self._entries, start=self.partition.start):
            if entry is not None and entry.state == "failed":
                for variant in range(len(self.manifest.schema.variants)):
                    key = chunk_key(self._specs["hidden_states"], number, variant)
                    (self.root / f"{self.partition.split}.zarr" / key).unlink(missing_ok=True)

    def _publish(self, record: Record) -> None:
        """Rename the staged files to their places and make the folders durable."""
        for entry in record.files:
            os.replace(self._staging / entry.path, self.root / entry.path)
        fsync_folders((self.root / entry.path).parent for entry in record.files)


def _filled(spec: ArraySpec, samples: int) -> NDArray[Any]:
    """A buffer for one partition of an array, full of its fill value."""
    dtype = object if spec.dtype == "string" else spec.dtype
    return np.full((samples, *spec.shape[1:]), spec.fill, dtype=dtype)
