"""What the completion records of a split vouch for: which samples are done, which files hold them."""

from collections.abc import Sequence
from pathlib import Path

from mmdiff_cache.errors import ConfigError, DamageError, StoreIncomplete

from .manifest import Manifest
from .records import FileEntry, Partition, SampleEntry, read_record


class Evidence:
    """The records of one split, as they were when it was opened."""

    def __init__(self, root: Path, manifest: Manifest, split: str) -> None:
        self._root, self._manifest = root, manifest
        self._ids = manifest.splits[split]
        self._where = root / f"{split}.zarr"
        self.samples: list[SampleEntry | None] = [None] * len(self._ids)
        """One entry a sample; None where no intact record speaks of it."""
        self.files: dict[str, FileEntry] = {}
        """Every recorded file, by path from the store's folder."""
        self._damage: dict[int, str] = {}
        for partition in manifest.partitions(split):
            self._load(partition)

    def state(self, sample: int) -> str:
        """`done`, `failed`, `pending` (never finished) or `damaged` (its record cannot be used)."""
        entry = self.samples[self._position(sample)]
        if entry is not None:
            return entry.state
        return "pending" if self._damage_of(sample) is None else "damaged"

    def require(self, samples: Sequence[int]) -> None:
        """Raise the error that names the first sample that may not be read."""
        for sample in samples:
            entry = self.samples[self._position(sample)]
            if entry is not None and entry.state == "done":
                continue
            name = f"sample {self._ids[sample]!r} of {self._where}"
            if entry is None:
                damage = self._damage_of(sample)
                if damage is not None:
                    raise DamageError(f"{name} cannot be trusted: {damage}")
                raise StoreIncomplete(f"{name} was never finished; run the same extraction again, it goes on")
            raise StoreIncomplete(f"{name} failed: {entry.reason}")

    def check_file(self, name: str) -> None:
        """Raise DamageError unless a file is there, as long as recorded: zarr reads a missing one as fill."""
        entry, file = self.files.get(name), self._root / name
        if entry is None:
            raise DamageError(f"{file} is in no completion record")
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise DamageError(f"{file} is missing, although its partition was finished") from None
        if size != entry.size:
            raise DamageError(f"{file} has {size} bytes, its record says {entry.size}")

    def _load(self, partition: Partition) -> None:
        ids = self._ids[partition.start : partition.stop]
        try:
            record = read_record(self._root, partition, self._manifest.fingerprint, ids)
        except DamageError as error:
            self._damage[partition.index] = str(error)
            return
        if record is not None:
            self.samples[record.start : record.stop] = record.samples
            self.files.update({entry.path: entry for entry in record.files})

    def _position(self, sample: int) -> int:
        if not 0 <= sample < len(self._ids):
            raise ConfigError(
                f"sample {sample} is not in {self._where}; it has samples 0 to {len(self._ids) - 1}"
            )
        return sample

    def _damage_of(self, sample: int) -> str | None:
        return self._damage.get(sample // self._manifest.schema.partition_size)
