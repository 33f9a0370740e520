"""Opens a store for reading, and says what is in it."""

import os
from pathlib import Path
from typing import Any

from mmdiff_cache.errors import ConfigError, DamageError

from .manifest import Manifest, read_manifest
from .metadata import check_metadata
from .split import SplitReader


class Store:
    """A store opened for reading, as it was at that moment: `store["train"]` is one split."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.path, self.manifest = root, manifest
        self._splits = {split: SplitReader(root, manifest, split) for split in manifest.splits}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._splits)

    def __getitem__(self, split: str) -> SplitReader:
        if split not in self._splits:
            raise ConfigError(f"split {split!r} is not in {self.path}; it has {', '.join(self._splits)}")
        return self._splits[split]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.path,)

    def __str__(self) -> str:
        from .summary import short_text  # summary reads stores, so it stands above this module

        return short_text(self)

    @property
    def samples_planned(self) -> int:
        """Samples in the plan, over all splits."""
        return sum(len(reader) for reader in self._splits.values())

    @property
    def samples_done(self) -> int:
        """Samples that can be read."""
        return sum(len(reader.finished) for reader in self._splits.values())

    @property
    def samples_failed(self) -> int:
        """Samples that were given up."""
        return sum(len(reader.failed) for reader in self._splits.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of all recorded files and of those written with the manifest."""
        recorded = sum(entry.size for reader in self._splits.values() for entry in reader.files)
        return recorded + sum((self.path / name).stat().st_size for name in self.manifest.metadata)


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store. Raises StoreError when the folder is none, DamageError when its metadata was changed."""
    root = Path(path)
    manifest = read_manifest(root)
    try:
        check_metadata(root, manifest)
    except DamageError:
        before, manifest = manifest, read_manifest(root)
        if manifest.metadata == before.metadata:
            raise
        check_metadata(root, manifest)  # the store grew between the two looks
    return Store(root, manifest)
