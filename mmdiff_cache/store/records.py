"""Completion records: the only evidence that a sample is in the store.

A record is written last, by atomic rename, when every file it lists is durable. Readers and resuming writers
trust records, never fill values and never the mere presence of files. Steps: docs/cache-format.md, "Order of
writing".
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mmdiff_cache.errors import DamageError

from .schema import FORMAT_VERSION

State = Literal["done", "failed"]


def partition_name(split: str, index: int) -> str:
    """How a partition is called: in its record's file name, in staging, in messages."""
    return f"{split}-{index:06d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """A fixed run of samples of one split, `start <= position < stop`: the unit of work and of redo."""

    split: str
    index: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of its record, without the ending."""
        return partition_name(self.split, self.index)

    @property
    def size(self) -> int:
        """Number of samples; the last partition of a split may be shorter than the others."""
        return self.stop - self.start


def partitions(split: str, samples: int, size: int) -> tuple[Partition, ...]:
    """Cut a split into partitions; every sample is in exactly one."""
    return tuple(
        Partition(split=split, index=index, start=start, stop=min(start + size, samples))
        for index, start in enumerate(range(0, samples, size))
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleEntry:
    """What became of one sample. A failed one keeps its slot and says why."""

    sample_id: str
    state: State
    content_hash: str | None = None
    """SHA-256 (hex) of the source picture and labels; None when the sample failed."""
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of the partition: path from the store's folder, bytes, SHA-256 (hex)."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The completion record of one partition, without time, process or host: equal work gives equal bytes."""

    split: str
    partition: int
    start: int
    stop: int
    identity: str
    """Fingerprint of the identity (`Manifest.fingerprint`) under which the samples were extracted."""
    samples: tuple[SampleEntry, ...]
    files: tuple[FileEntry, ...]
    label_set: str | None = None
    """The label set that it speaks of, where that was added later; None: all that was extracted."""

    @property
    def name(self) -> str:
        """Name of its partition."""
        return partition_name(self.split, self.partition)


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8; a file name with stray bytes cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def canonical(values: Any) -> bytes:
    """JSON in the one form that is hashed: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def seal(values: Mapping[str, Any]) -> bytes:
    """A JSON document with format_version and the SHA-256 of its own canonical form."""
    body = {**values, "format_version": FORMAT_VERSION}
    body["sha256"] = hashlib.sha256(canonical(body)).hexdigest()
    return json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """The document that `seal` wrote, less its hash. Raises DamageError when it is not what was written."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise DamageError(f"{name} is not JSON: it was cut or overwritten") from None
    if not isinstance(body, dict) or "sha256" not in body:
        raise DamageError(f"{name} has no sha256 of itself: it was not written by this format")
    stated = body.pop("sha256")
    if hashlib.sha256(canonical(body)).hexdigest() != stated:
        raise DamageError(f"{name} does not match its own sha256: it was changed after it was written")
    return body


def encode_record(record: Record) -> bytes:
    """The bytes of the record's file."""
    body = dataclasses.asdict(record)
    if record.label_set is None:
        del body["label_set"]
    return seal(body)


def read_record(
    root: Path, partition: Partition, identity: str, ids: Sequence[str], label_set: str | None = None
) -> Record | None:
    """The record of a partition, or None where there is none yet.

    `ids` are the partition's samples by the manifest. The record may speak of the first of them alone: the
    last partition of a split was shorter before samples were appended. Raises DamageError when the record is
    not the one that belongs there: unreadable, of another identity, or about other samples.
    """
    path = root / record_path(partition, label_set)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    body = unseal(data, str(path))
    if body.get("format_version") != FORMAT_VERSION:
        raise DamageError(
            f"{path} has format version {body.get('format_version')!r}, its store {FORMAT_VERSION}"
        )
    try:
        record = Record(
            split=body["split"],
            partition=body["partition"],
            start=body["start"],
            stop=body["stop"],
            identity=body["identity"],
            samples=tuple(SampleEntry(**entry) for entry in body["samples"]),
            files=tuple(FileEntry(**entry) for entry in body["files"]),
            label_set=body.get("label_set"),
        )
    except (KeyError, TypeError) as error:
        raise DamageError(f"{path} is not a completion record: {error}") from error
    place = (record.split, record.partition, record.start, record.label_set)
    expected = (partition.split, partition.index, partition.start, label_set)
    if place != expected or record.stop > partition.stop:
        raise DamageError(
            f"{path} is the record of {place}, samples to {record.stop}, not of {expected}, "
            f"samples to {partition.stop}"
        )
    stray = next((entry.path for entry in record.files if not _is_of(entry.path, partition.split)), None)
    if stray is not None:
        raise DamageError(f"{path} lists {stray!r}, which is no file of split {partition.split}")
    if record.identity != identity:
        raise DamageError(
            f"{path} was written under another identity ({record.identity[:12]}, not {identity[:12]})"
        )
    if [sample.sample_id for sample in record.samples] != list(ids[: record.stop - record.start]):
        raise DamageError(f"{path} lists other samples than the manifest does")
    return record


def _is_of(name: str, split: str) -> bool:
    parts = PurePosixPath(name).parts
    return len(parts) > 2 and parts[0] == f"{split}.zarr" and ".." not in parts


def record_path(partition: Partition, label_set: str | None = None) -> str:
    """Where the record of a partition lies, from the store's folder; that of an added label set beside it."""
    return f"partitions/{partition.name}{f'.{label_set}' if label_set else ''}.json"


def first_fault(root: Path, record: Record) -> str | None:
    """The first listed file that is absent or has another size, in words; None when all sizes fit."""
    for entry in record.files:
        try:
            size = (root / entry.path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return f"{entry.path} is missing"
        if size != entry.size:
            return f"{entry.path} has {size} bytes, its record says {entry.size}"
    return None
