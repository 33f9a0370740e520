"""Reads chunks straight out of shards: one task a chunk, checked and decoded right where it is wanted.

zarr does the same in more steps, through temporaries as large as the data. What an array's metadata does not
state in a way known here is left to it (`SplitReader`).
"""

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.errors import DamageError, StorageError

from .evidence import Evidence
from .shards import EMPTY, ShardLayout, decode_chunk, decode_index
from .threads import codec_pool

INDEX_BYTES = 4 * 1024**2
"""Indexes that are kept; those of sixteen maps a shard have 256 bytes each."""
SHARDS_OPEN = 64

Wanted = tuple[int, NDArray[Any]]
"""Number of a chunk in its shard, and where its values go."""
Stamp = tuple[int, int, int]
"""What tells one file from another that took its name: inode, bytes, time of the last change."""


class ChunkReader:
    """The chunks of one split's arrays. May be used from several threads."""

    def __init__(self, root: Path, evidence: Evidence) -> None:
        self._root, self._evidence = root, evidence
        self._indexes: OrderedDict[str, tuple[Stamp, NDArray[np.uint64]]] = OrderedDict()

    def read(self, layout: ShardLayout, wanted: Sequence[tuple[str, Sequence[Wanted]]]) -> None:
        """Fill every target from its chunk; `wanted` goes by file, named from the store's folder.

        Raises DamageError where a file is not what its record says, StorageError where it cannot be read.
        """
        for start in range(0, len(wanted), SHARDS_OPEN):
            self._read_some(layout, wanted[start : start + SHARDS_OPEN])

    def _read_some(self, layout: ShardLayout, wanted: Iterable[tuple[str, Sequence[Wanted]]]) -> None:
        pool = codec_pool()
        futures: list[Future[None]] = []
        with ExitStack() as files:
            try:
                for name, chunks in wanted:
                    shard = files.enter_context(self._open(name, layout))
                    futures += [pool.submit(shard.read, number, target) for number, target in chunks]
                for future in futures:
                    future.result()
            finally:
                for future in futures:
                    future.cancel()
                wait(futures)  # no file may be closed, and no target given back, under a task that reads

    def _open(self, name: str, layout: ShardLayout) -> "OpenShard":
        self._evidence.check_file(name)
        shard = OpenShard(self._root / name, layout)
        try:
            shard.places = self._places(name, shard)
        except BaseException:
            shard.close()
            raise
        return shard

    def _places(self, name: str, shard: "OpenShard") -> NDArray[np.uint64]:
        """The index of a shard, kept as long as the file is the same: one written anew may have another."""
        stamp = shard.stamp()
        known, places = self._indexes.get(name, (None, None))
        if places is None or known != stamp:
            places = shard.read_index()
            self._indexes[name] = stamp, places
        while len(self._indexes) > max(1, INDEX_BYTES // places.nbytes):
            with suppress(KeyError):  # another thread was quicker; a lock would not survive a fork
                self._indexes.popitem(last=False)
        return places


class OpenShard:
    """A shard's file while its chunks are read."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path, self.layout = path, layout
        self.places: NDArray[np.uint64] = np.empty((0, 2), np.uint64)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(error) from error

    def stamp(self) -> Stamp:
        """Which file this is."""
        status = os.fstat(self._descriptor)
        return status.st_ino, status.st_size, status.st_mtime_ns

    def read_index(self) -> NDArray[np.uint64]:
        """Where the chunks lie, [chunk, 2]."""
        size = os.fstat(self._descriptor).st_size
        length = self.layout.index_bytes
        if size < length:
            raise DamageError(f"{self.path} is damaged (it is too short for its index)")
        try:
            return decode_index(self.layout, self._bytes(length, size - length), size)
        except ValueError as error:
            raise self._damaged(error) from error

    def read(self, number: int, target: NDArray[Any]) -> None:
        """Decode one chunk into `target`."""
        offset, length = (int(value) for value in self.places[number])
        if offset == EMPTY:
            raise DamageError(f"{self.path} is damaged (it lacks chunk {number}, which was written)")
        data = self._bytes(length, offset)
        try:
            if target.flags.c_contiguous:
                decode_chunk(self.layout, data, target)
            else:
                values = np.empty(target.shape, target.dtype)
                decode_chunk(self.layout, data, values)
                target[...] = values
        except (ValueError, RuntimeError) as error:
            raise self._damaged(error) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> "OpenShard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bytes(self, length: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> StorageError:
        return StorageError(f"cannot read {self.path}: {error.strerror or error}")

    def _damaged(self, error: Exception) -> DamageError:
        return DamageError(f"{self.path} is damaged ({error}); the rest of the store can still be read")
