"""Looks at every byte and every value of a store: is it still what its records vouch for?

Files first (size and SHA-256), then what is in them, sample by sample: finite features whose statistics are
those that were taken before they were stored, concept maps that add up, labels in their ranges, ids and noise
keys that belong to the sample. A store that is not finished is not damaged; what is missing is only counted.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.errors import DamageError, MMDiffError
from mmdiff_cache.records import STATISTICS, Progress, noise_key

from .arrays import arrays
from .checks import stray_id
from .files import sha256_file
from .manifest import MANIFEST, Manifest, read_manifest
from .metadata import is_next
from .records import FileEntry, Partition, Record, read_record, record_path
from .split import SplitReader

SUM_TOLERANCE = 1e-3
"""Of the shares of all concepts at a token, from 1."""
RMS_TOLERANCE, RMS_TOLERANCE_INT8 = 1e-3, 1e-2
"""Relative, between a map's stored root mean square (taken in float32) and that of its stored values."""
HALF_STEP, SMALLEST_HALF = 2.0**-10, 2.0**-24
"""Relative spacing of float16 numbers, and the smallest of them."""
LARGEST_HALF = 65504.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong: the file or the sample it was found in, and what."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What a look at a store found."""

    path: str
    files: int
    bytes: int
    samples: int
    """Finished samples whose values were looked at."""
    failed: int
    pending: int
    """Samples that were never finished: work to do, not damage."""
    findings: tuple[Finding, ...]
    partitions: frozenset[str] = frozenset()
    """Names of the recorded partitions that have to be extracted again."""

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "partitions": sorted(self.partitions), "sound": self.sound}

    def __str__(self) -> str:
        seen = f"{self.files:,} files, {self.bytes / 1e6:,.1f} MB, the values of {self.samples:,} samples"
        rest = f"{self.failed:,} failed samples, {self.pending:,} not finished"
        verdict = "sound" if self.sound else f"{len(self.findings)} findings"
        return "\n".join([f"{self.path}: {verdict} ({seen}; {rest})", *map(str, self.findings)])


def verify(
    path: str | os.PathLike[str],
    limit: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a store, or the first `limit` samples of each split; it is read, never written.

    Raises StoreError where there is no store. Everything else that is wrong is a finding.
    """
    root = Path(path)
    try:
        manifest = read_manifest(root)
    except DamageError as error:
        broken = Finding(where=MANIFEST, reason=str(error))
        return Verification(
            path=str(root), files=1, bytes=0, samples=0, failed=0, pending=0, findings=(broken,)
        )
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return _Check(root, manifest, limit, pool, progress).run()


class _Check:
    """One verification under way."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        limit: int | None,
        pool: ThreadPoolExecutor,
        progress: Progress | None,
    ) -> None:
        self._root, self._manifest, self._limit = root, manifest, limit
        self._pool, self._progress = pool, progress
        self._added = [label.spec.name for label in manifest.schema.labels if label.added]
        self._findings: list[Finding] = []
        self._damaged: set[str] = set()
        self._files = self._bytes = self._failed = self._pending = self._samples = 0

    def run(self) -> Verification:
        """All checks, in the order in which one relies on the other."""
        damaged = set(self._metadata())
        records = list(self._records())
        damaged |= set(self._recorded_files(records))
        for record in records:
            metadata = (name for name in damaged if name.startswith(f"{record.split}.zarr/"))
            if not any(name.endswith("zarr.json") for name in metadata):
                self._values(record, damaged)
        return Verification(
            path=str(self._root),
            files=self._files,
            bytes=self._bytes,
            samples=self._samples,
            failed=self._failed,
            pending=self._pending,
            findings=tuple(self._findings),
            partitions=frozenset(self._damaged),
        )

    def _metadata(self) -> Iterator[str]:
        """Names of the files written with the manifest that are not what they were."""
        for name, stated in self._manifest.metadata.items():
            self._files += 1
            try:
                content = (self._root / name).read_bytes()
            except OSError as error:
                yield self._find(name, f"cannot be read: {error.strerror or error}")
                continue
            self._bytes += len(content)
            if hashlib.sha256(content).hexdigest() != stated and not is_next(self._root, name, content):
                yield self._find(name, "is not the file that the store was made with")

    def _records(self) -> Iterator[Record]:
        """The intact records of the partitions that are looked at."""
        for split, ids in self._manifest.splits.items():
            for partition in self._manifest.partitions(split):
                wanted = self._wanted(partition)
                if not wanted:
                    continue
                own = ids[partition.start : partition.stop]
                for label_set in (None, *self._added):
                    try:
                        record = read_record(
                            self._root, partition, self._manifest.fingerprint, own, label_set
                        )
                    except (MMDiffError, OSError) as error:
                        self._find(record_path(partition, label_set), str(error))
                        continue
                    if label_set is None:
                        self._count(record, wanted)
                    if record is not None:
                        yield record

    def _count(self, record: Record | None, wanted: int) -> None:
        states = [entry.state for entry in record.samples[:wanted]] if record is not None else []
        self._failed += states.count("failed")
        self._pending += wanted - len(states)

    def _wanted(self, partition: Partition) -> int:
        """How many samples of a partition are looked at, from its start."""
        most = partition.stop if self._limit is None else min(partition.stop, self._limit)
        return max(0, most - partition.start)

    def _recorded_files(self, records: Sequence[Record]) -> Iterator[str]:
        """Names of the recorded files that are not what their record says."""
        entries = [(record, entry) for record in records for entry in self._entries(record)]
        faults = self._pool.map(self._fault, [entry for _, entry in entries])
        for number, ((record, entry), fault) in enumerate(zip(entries, faults, strict=True), 1):
            self._files += 1
            self._bytes += entry.size
            self._report(number, len(entries), "files")
            if fault is not None:
                self._damage(record)
                yield self._find(entry.path, fault)

    def _entries(self, record: Record) -> Iterable[FileEntry]:
        """The files of a record, without the shards of samples behind the limit."""
        if self._limit is None or record.stop <= self._limit:
            return record.files
        large = [spec.path for spec in arrays(self._manifest.schema, 1) if spec.reach == "sample"]
        folders = {f"{record.split}.zarr/{path}" for path in large}
        return [
            entry
            for entry in record.files
            if (place := entry.path.rpartition("/"))[0] not in folders
            or int(place[2].removeprefix("c.").split(".")[0]) < self._limit
        ]

    def _fault(self, entry: FileEntry) -> str | None:
        file = self._root / entry.path
        try:
            size = file.stat().st_size
            if size != entry.size:
                return f"has {size} bytes, its record says {entry.size}"
            return None if sha256_file(file) == entry.sha256 else "does not have the SHA-256 of its record"
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"

    def _values(self, record: Record, damaged: set[str]) -> None:
        """Look into the samples of a partition; a file that is known to be damaged is not reported twice."""
        reader = SplitReader(self._root, self._manifest, record.split)
        done = [
            record.start + n
            for n, entry in enumerate(record.samples)
            if entry.state == "done" and (self._limit is None or record.start + n < self._limit)
        ]
        look = partial(_sample_fault, reader, damaged, record.label_set)
        for number, (sample, fault) in enumerate(zip(done, self._pool.map(look, done), strict=True), 1):
            self._samples += record.label_set is None
            self._report(number, len(done), f"values of {record.name}")
            if fault is not None:
                self._damage(record)
                self._find(f"sample {reader.ids[sample]!r} of {record.split}", fault)

    def _damage(self, record: Record) -> None:
        """Note what has to be extracted again; a label set that was added later has another source."""
        if record.label_set is None:
            self._damaged.add(record.name)

    def _find(self, where: str, reason: str) -> str:
        self._findings.append(Finding(where=where, reason=reason))
        return where

    def _report(self, done: int, total: int, state: str) -> None:
        if self._progress is not None:
            self._progress(done, total, state)


def _sample_fault(reader: SplitReader, damaged: set[str], label_set: str | None, sample: int) -> str | None:
    """What is wrong with the values of one sample, in words; None where all is well, or known already.

    With a label set, what is wrong with that label alone.
    """
    checks: tuple[Callable[[SplitReader, int], str | None], ...] = (
        _wrong_identity,
        _wrong_features,
        _wrong_concepts,
        _wrong_discriminative,
        _wrong_labels,
    )
    for check in checks if label_set is None else (partial(_wrong_label, name=label_set),):
        try:
            fault = check(reader, sample)
        except MMDiffError as error:
            if any(name in str(error) for name in damaged):
                continue
            fault = str(error)
        if fault is not None:
            return fault
    return None


def _wrong_identity(reader: SplitReader, sample: int) -> str | None:
    """The arrays that say which sample a row belongs to."""
    [stored] = reader.stored_ids([sample])
    if stored != reader.ids[sample]:
        return f"its row belongs to {stored!r}"
    keys = [list(noise_key(reader.seed, stored, variant.noise_draw)) for variant in reader.variants]
    if reader.noise_keys([sample])[0].tolist() != keys:
        return "its noise key is not that of its id"
    reader.prompts([sample])
    reader.images([sample])
    if reader.drawn and reader.generation_seeds([sample])[0] < 0:
        return "it has no generation seed"
    if reader.drawn and not np.isfinite(reader.sigmas([sample])).all():
        return "it was captured at noise levels that are not finite"
    return None


def _wrong_features(reader: SplitReader, sample: int) -> str | None:
    """Hidden states and latent: finite, and with the statistics that were taken before they were stored."""
    if not np.isfinite(reader.latents([sample])).all():
        return "its latent has values that are not finite"
    audit = reader.audit([sample])[0]
    tolerance = RMS_TOLERANCE_INT8 if reader.lossy else RMS_TOLERANCE
    for variant in range(len(reader.variants)):
        maps = reader.hidden_states([sample], variant=variant)[0]
        for step, layer in np.ndindex(*maps.shape[:2]):
            fault = _wrong_map(maps[step, layer], audit[variant, step, layer], tolerance)
            if fault is not None:
                return f"{reader.layers[layer]} at t={reader.timesteps[step]:g}, variant {variant}: {fault}"
    return None


def _wrong_map(values: NDArray[np.float16], audit: NDArray[np.float32], tolerance: float) -> str | None:
    stated = dict(zip(STATISTICS, (float(x) for x in audit), strict=True))
    wide = values.astype(np.float32)
    if not np.isfinite(wide).all():
        return "has values that are not finite"
    largest, expected = float(np.abs(wide).max()), min(stated["max_abs"], LARGEST_HALF)
    if abs(largest - expected) > HALF_STEP * expected + SMALLEST_HALF:
        return f"its largest value is {largest:g}, {expected:g} was stored in the audit"
    rms = float(np.sqrt(np.square(wide, dtype=np.float64).mean()))
    if not stated["clipped"] and abs(rms - stated["rms"]) > tolerance * stated["rms"] + SMALLEST_HALF:
        return f"its root mean square is {rms:g}, {stated['rms']:g} was stored in the audit"
    return None


def _wrong_concepts(reader: SplitReader, sample: int) -> str | None:
    for name in reader.vocabularies:
        for variant in range(len(reader.variants)):
            if not np.isfinite(reader.concept_scores(name, [sample], variant=variant)).all():
                return f"concept scores of {name} have values that are not finite"
            shares = reader.concept_maps(name, [sample], variant)[0].sum(axis=0)
            if not np.abs(shares - 1).max() <= SUM_TOLERANCE:
                return f"concept maps of {name} do not add up to 1"
    return None


def _wrong_discriminative(reader: SplitReader, sample: int) -> str | None:
    for name in reader.discriminative:
        for variant in range(len(reader.variants)):
            if not np.isfinite(reader.discriminative_features(name, [sample], variant)).all():
                return f"discriminative features of {name} have values that are not finite"
    return None


def _wrong_labels(reader: SplitReader, sample: int) -> str | None:
    own = (name for name in reader.label_specs if name not in reader.added_labels)
    faults = (_wrong_label(reader, sample, name) for name in own)
    return next((fault for fault in faults if fault is not None), None)


def _wrong_label(reader: SplitReader, sample: int, name: str) -> str | None:
    for values in (reader.labels(name, [sample])[0], reader.original_label(name, sample)):
        stray = stray_id(values, reader.label_specs[name])
        if stray is not None:
            return f"label {name} has the value {stray}, which is no class"
    return None
