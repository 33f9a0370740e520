"""Writes one partition: hidden states sample by sample, small arrays at the end, the record last.

Everything is staged and made durable first. Only `commit` touches the store, in an order that lets a kill at
any moment leave either no record or a true one.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.errors import DamageError, DataError, StoreError
from mmdiff_cache.records import FeatureBatch, PreparedSample, noise_key

from .arrays import arrays, discriminative_path, filled_rows
from .checks import check_batch, feature_arrays, sample_fault
from .files import storage_errors
from .manifest import Manifest
from .metadata import chunk_key
from .quantise import quantise
from .records import Partition, Record, SampleEntry, encode_record, read_record, record_path
from .staging import Staging

logger = logging.getLogger(__name__)


class PartitionWriter:
    """One partition in the making. Every slot must be written or failed before `commit`.

    Used as a context manager it removes what it staged when it is left without a commit. It holds no lock:
    the `StoreWriter` that began it does, so it can also work in another process for that writer.
    Memory: the partition's small arrays and one sample's hidden states.
    """

    def __init__(self, root: Path, manifest: Manifest, partition: Partition) -> None:
        self.root, self.manifest, self.partition = root, manifest, partition
        self.ids = manifest.splits[partition.split][partition.start : partition.stop]
        self._schema = manifest.schema.extracted
        specs = arrays(self._schema, len(manifest.splits[partition.split]))
        self._specs = {spec.path: spec for spec in specs if spec.reach != "array"}
        self._buffers = {
            p: filled_rows(s, partition.size) for p, s in self._specs.items() if s.reach == "partition"
        }
        self._buffers["sample_id"][:] = self.ids
        self._entries: list[SampleEntry | None] = [None] * partition.size
        self._staging = Staging(root, partition, self._specs)

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
            reason = sample_fault(self._schema, sample, row)
            if reason is not None:
                self.fail(offset + number, sample.sample_id, reason)
                continue
            self._stage_hidden_states(offset + number, row.pop("hidden_states"))
            for encoder in self._schema.discriminative:
                path = discriminative_path(encoder.name)
                self._stage_shards(path, offset + number, row.pop(path))
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
            for path, values in self._buffers.items():
                self._staging.rows(path, values)
            record = Record(
                split=self.partition.split,
                partition=self.partition.index,
                start=self.partition.start,
                stop=self.partition.stop,
                identity=self.manifest.fingerprint,
                samples=entries,
                files=self._staging.files,
            )
            self._check_kept(record)
            self._staging.publish(record_path(self.partition), encode_record(record), self._failed_shards())
        self._list_failures(record)
        return record

    def abort(self) -> None:
        """Remove what was staged. The store itself was not touched."""
        self._staging.remove()

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
        """`values` is [V T L h w C]; with codec int8 it is rounded first."""
        if self._schema.codec == "int8":
            rounded = [self._quantised(offset, variant, maps) for variant, maps in enumerate(values)]
            self._stage_shards("hidden_states", offset, rounded)
        else:
            self._stage_shards("hidden_states", offset, values)

    def _stage_shards(self, path: str, offset: int, values: Iterable[NDArray[Any]]) -> None:
        """One shard a variant of an array whose files are those of single samples."""
        with storage_errors(self.root):
            for variant, maps in enumerate(values):
                self._staging.shard(path, (self.partition.start + offset, variant), maps)

    def _quantised(self, offset: int, variant: int, maps: NDArray[np.float16]) -> NDArray[np.int8]:
        """The maps [T L h w C] of one variant as whole numbers; their scales go to the small arrays."""
        steps = np.empty(maps.shape, np.int8)
        for position in np.ndindex(*maps.shape[:2]):
            steps[position], scale = quantise(maps[position])
            self._buffers["hidden_states_scale"][(offset, variant, *position)] = scale
        return steps

    def _keep(self, offset: int, sample: PreparedSample, row: dict[str, NDArray[Any]]) -> None:
        """Put a sample's small values into the partition's buffers."""
        for path, values in row.items():
            self._buffers[path][offset] = values
        self._buffers["images"][offset] = sample.image
        self._buffers["prompt"][offset] = sample.prompt
        if self._schema.drawn:
            self._buffers["generation_seed"][offset] = sample.generation_seed
        for variant, setting in enumerate(self._schema.variants):
            key = noise_key(self.manifest.seed, sample.sample_id, setting.noise_draw)
            self._buffers["noise_key"][offset, variant] = key
        for label in self._schema.labels:
            name = label.spec.name
            rows, columns = sample.original_labels[name].shape
            self._buffers[f"labels/{name}/map"][offset] = sample.labels[name]
            self._buffers[f"labels/{name}/original"][offset, :rows, :columns] = sample.original_labels[name]
            self._buffers[f"labels/{name}/original_size"][offset] = rows, columns
        self._entries[offset] = SampleEntry(
            sample_id=sample.sample_id, state="done", content_hash=sample.content_hash
        )

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

    def _list_failures(self, record: Record) -> None:
        """A file for people, failures/<partition>.jsonl; a partition without failures has none."""
        failed = [entry for entry in record.samples if entry.state == "failed"]
        file = self.root / "failures" / f"{self.partition.name}.jsonl"
        lines = [json.dumps({"sample_id": entry.sample_id, "reason": entry.reason}) for entry in failed]
        try:
            if failed:
                file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            else:
                file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot list the failed samples in %s: %s", file, error)

    def _failed_shards(self) -> Iterator[str]:
        """Where the features of samples that fail now may lie from before."""
        large = [spec for spec in self._specs.values() if spec.reach == "sample"]
        for number, entry in enumerate(self._entries, start=self.partition.start):
            if entry is not None and entry.state == "failed":
                for spec, variant in product(large, range(len(self._schema.variants))):
                    yield f"{self.partition.split}.zarr/{chunk_key(spec, number, variant)}"
