"""The files of one partition on their way into the store: staged, made durable, renamed, then recorded.

The order lets a kill at any moment leave either no record or a true one.
"""

import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import zarr
from numpy.typing import NDArray

from mmdiff_cache.errors import StoreError

from .arrays import ArraySpec
from .files import fsync_file, fsync_folders, sha256_file, staging_folder, storage_errors, write_durably
from .metadata import chunk_key
from .records import FileEntry, Partition
from .shard_writer import write_shard
from .shards import ShardLayout, parse_layout
from .threads import codec_pool

_CONFIG = threading.Lock()
"""zarr's configuration is the process's: a thread must not put it back while another relies on it."""


class Staging:
    """A folder of its own under staging/, with what was staged so far. OSErrors pass, but from the start."""

    def __init__(self, root: Path, partition: Partition, specs: Mapping[str, ArraySpec]) -> None:
        self._root, self._partition, self._specs = root, partition, specs
        self._files: dict[str, FileEntry] = {}
        self._layouts: dict[str, ShardLayout] = {}
        numcodecs.blosc.use_threads = False  # as in open_writer, which may have run in another process
        with storage_errors(root):
            self._folder = staging_folder(root, partition.name)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """What was staged, sorted by path."""
        return tuple(self._files[path] for path in sorted(self._files))

    def layout(self, path: str) -> ShardLayout:
        """How the shards of an array are encoded; makes their folder in staging the first time."""
        if path not in self._layouts:
            folder = f"{self._partition.split}.zarr/{path}"
            found = parse_layout((self._root / folder / "zarr.json").read_bytes())
            if found is None:
                raise StoreError(f"{self._root / folder} has codecs that this mmdiff-cache cannot write")
            (self._folder / folder).mkdir(parents=True)
            self._layouts[path] = found
        return self._layouts[path]

    def shard(self, path: str, position: tuple[int, ...], values: NDArray[Any]) -> None:
        """Stage one shard of a large array as a stream."""
        layout = self.layout(path)
        name = f"{self._partition.split}.zarr/{chunk_key(self._specs[path], *position)}"
        shaped = values.reshape(layout.shard)
        self._files[name] = write_shard(self._folder, name, layout, shaped, codec_pool())

    def rows(self, path: str, values: NDArray[Any]) -> None:
        """Stage the partition's shard of a small array."""
        array = self._copied_array(path)
        array.set_basic_selection(np.s_[self._partition.start : self._partition.stop], values)
        name = f"{self._partition.split}.zarr/{chunk_key(self._specs[path], self._partition.index)}"
        file = self._folder / name
        fsync_file(file)
        self._files[name] = FileEntry(path=name, size=file.stat().st_size, sha256=sha256_file(file))

    def publish(self, record: str, content: bytes, gone: Iterable[str] = ()) -> None:
        """Take back an older record, move all files into the store, write the record; all durably.

        `gone` are files of the store that the record does not vouch for any more.
        """
        old = self._root / record
        if old.exists():
            old.unlink()
            fsync_folders([old.parent])
        for name in gone:
            (self._root / name).unlink(missing_ok=True)
        for name in self._files:
            os.replace(self._folder / name, self._root / name)
        fsync_folders((self._root / name).parent for name in self._files)
        write_durably(self._root, {record: content})
        shutil.rmtree(self._folder)

    def remove(self) -> None:
        """Give up what was staged. The store itself was not touched."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _copied_array(self, path: str) -> "zarr.Array[Any]":
        """A copy of an array's metadata in staging: what is written gets the store's keys and codecs."""
        name = f"{self._partition.split}.zarr/{path}"
        folder = self._folder / name
        folder.mkdir(parents=True)
        shutil.copyfile(self._root / name / "zarr.json", folder / "zarr.json")
        # open_array ignores a config of its own; without this a shard of nothing but fill is not written
        with _CONFIG, zarr.config.set({"array.write_empty_chunks": True}):
            return zarr.open_array(folder, mode="r+", zarr_format=3)
