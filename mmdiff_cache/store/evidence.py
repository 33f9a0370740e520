"""What the completion records of a split vouch for: which samples are done, which files hold them."""

from collections.abc import Sequence
from pathlib import Path

from mmdiff_cache.errors import ConfigError, DamageError, StoreIncomplete

from .manifest import Manifest
from .records import FileEntry, SampleEntry, read_record


class Vouched:
    """What the records of one kind say of a split: those of the extraction, or of one added label set."""

    def __init__(self, root: Path, manifest: Manifest, split: str, label_set: str | None) -> None:
        ids = manifest.splits[split]
        self.samples: list[SampleEntry | None] = [None] * len(ids)
        """One entry a sample; None where no intact record speaks of it."""
        self.files: dict[str, FileEntry] = {}
        """Every recorded file, by path from the store's folder."""
        self._partition_size = manifest.schema.partition_size
        self._damage: dict[int, str] = {}
        for partition in manifest.partitions(split):
            own = ids[partition.start : partition.stop]
            try:
                record = read_record(root, partition, manifest.fingerprint, own, label_set)
            except DamageError as error:
                self._damage[partition.index] = str(error)
                continue
            if record is not None:
                self.samples[record.start : record.stop] = record.samples
                self.files.update({entry.path: entry for entry in record.files})

    def state(self, sample: int) -> str:
        """`done`, `failed`, `pending` (never finished) or `damaged` (its record cannot be used)."""
        entry = self.samples[sample]
        if entry is not None:
            return entry.state
        return "pending" if self._damage_of(sample) is None else "damaged"

    def check(self, sample: int, name: str, remedy: str) -> None:
        """Raise the error that says why a sample, called `name` in it, may not be read."""
        entry = self.samples[sample]
        if entry is None:
            damage = self._damage_of(sample)
            if damage is not None:
                raise DamageError(f"{name} cannot be trusted: {damage}")
            raise StoreIncomplete(f"{name} was never finished; {remedy}")
        if entry.state != "done":
            raise StoreIncomplete(f"{name} failed: {entry.reason}")

    def _damage_of(self, sample: int) -> str | None:
        return self._damage.get(sample // self._partition_size)


class Evidence:
    """The records of one split, as they were when it was opened."""

    def __init__(self, root: Path, manifest: Manifest, split: str) -> None:
        self._root, self._ids = root, manifest.splits[split]
        self._where = root / f"{split}.zarr"
        self._extracted = Vouched(root, manifest, split, None)
        added = [label.spec.name for label in manifest.schema.labels if label.added]
        self._added = {name: Vouched(root, manifest, split, name) for name in added}
        self.files = {
            path: entry
            for vouched in (self._extracted, *self._added.values())
            for path, entry in vouched.files.items()
        }
        """Every recorded file, by path from the store's folder."""

    @property
    def samples(self) -> Sequence[SampleEntry | None]:
        """One entry a sample; None where no intact record speaks of it."""
        return self._extracted.samples

    def entries(self, label_set: str) -> Sequence[SampleEntry | None]:
        """Those of an added label set; of one that came with the samples, the samples' own."""
        return self._added.get(label_set, self._extracted).samples

    def state(self, sample: int, label_set: str | None = None) -> str:
        """`done`, `failed`, `pending` (never finished) or `damaged` (its record cannot be used).

        With a label set, that of the sample's label, if the sample itself is done.
        """
        state = self._extracted.state(self._position(sample))
        return self._added[label_set].state(sample) if state == "done" and label_set in self._added else state

    def require(self, samples: Sequence[int], label_set: str | None = None) -> None:
        """Raise the error that names the first sample, or label of one, that may not be read."""
        for sample in samples:
            name = f"sample {self._ids[self._position(sample)]!r} of {self._where}"
            self._extracted.check(sample, name, "run the same extraction again, it goes on")
            if label_set in self._added:
                label = f"label {label_set!r} of {name}"
                self._added[label_set].check(sample, label, "run the same 'labels add' again, it goes on")

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

    def _position(self, sample: int) -> int:
        if not 0 <= sample < len(self._ids):
            raise ConfigError(
                f"sample {sample} is not in {self._where}; it has samples 0 to {len(self._ids) - 1}"
            )
        return sample
