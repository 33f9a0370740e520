"""The arrays of one split, whichever they are: rows and chunks, each vouched for by a record.

Chunks are read straight out of their shards (`chunks`); zarr reads what is one chunk a partition, and arrays
whose metadata says something that `shards` does not know. All of it may be called from several threads.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from mmdiff_cache.errors import ConfigError, DamageError, MMDiffError, StorageError

from .arrays import ArraySpec
from .chunks import ChunkReader
from .evidence import Evidence
from .metadata import chunk_key
from .shards import ShardLayout, parse_layout


class SplitArrays:
    """Reads the arrays of `specs` from the group of a split."""

    def __init__(
        self, root: Path, split: str, specs: Mapping[str, ArraySpec], evidence: Evidence, partition_size: int
    ) -> None:
        self.path = root / f"{split}.zarr"
        self._root, self._split, self._specs = root, split, specs
        self._evidence, self._partition_size = evidence, partition_size
        self._opened: dict[str, zarr.Array[Any]] = {}
        self._layouts: dict[str, ShardLayout | None] = {}
        self._chunks = ChunkReader(root, evidence)

    def rows(self, path: str, samples: Sequence[int], variant: int | None = None) -> NDArray[Any]:
        """Rows of a small array."""
        if path not in self._specs:
            raise ConfigError(f"{self.path} has no array {path}")
        self._evidence.require(samples)
        spec = self._specs[path]
        inner = spec.shape[1:] if variant is None else spec.shape[2:]
        out = np.empty((len(samples), *inner), object if spec.dtype == "string" else spec.dtype)
        if spec.chunk[0] == 1 and spec.dtype != "string":
            behind = () if variant is None else (variant,)
            self.fill(path, [((n, *behind), out[row]) for row, n in enumerate(samples)])
            return out
        for run, target in _runs(samples, self._partition_size):
            with self._reading(path, (run.start // self._partition_size,)) as array:
                out[target] = array.get_basic_selection(run if variant is None else (run, variant))
        return out

    def fill(self, path: str, wanted: Sequence[tuple[tuple[int, ...], NDArray[Any]]]) -> None:
        """Fill each target with the chunk at its position; a position names all axes that chunks divide."""
        layout, spec = self._layout(path), self._specs[path]
        shard = spec.shard or spec.chunk
        if layout is None:
            for position, target in wanted:
                outer = tuple(at // size for at, size in zip(position, shard, strict=False))
                with self._reading(path, outer) as array:
                    target[...] = array.get_basic_selection(position)
            return
        files: dict[str, list[tuple[int, NDArray[Any]]]] = {}
        for position, target in wanted:
            outer, number = layout.locate((*position, *[0] * (len(spec.shape) - len(position))))
            files.setdefault(f"{self._split}.zarr/{chunk_key(spec, *outer)}", []).append((number, target))
        self._chunks.read(layout, list(files.items()))

    def _layout(self, path: str) -> ShardLayout | None:
        """How an array's shards can be read without zarr; None where its metadata says something unknown."""
        if path not in self._layouts:
            spec = self._specs[path]
            found = parse_layout(self._metadata(path))
            fits = found is not None and (found.shard, found.chunk, found.dtype) == (
                spec.shard,
                spec.chunk,
                np.dtype(spec.dtype),
            )
            self._layouts[path] = found if fits else None
        return self._layouts[path]

    def _metadata(self, path: str) -> bytes:
        file = self.path / path / "zarr.json"
        try:
            return file.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read {file}: {error.strerror or error}") from error

    @contextmanager
    def _reading(self, path: str, position: tuple[int, ...]) -> Generator["zarr.Array[Any]"]:
        """Give the array after a look at the shard's size; any trouble inside it is damage of that file."""
        name = f"{self._split}.zarr/{chunk_key(self._specs[path], *position)}"
        file = self._root / name
        try:
            self._evidence.check_file(name)
            yield self.open(path)
        except MMDiffError:
            raise
        except OSError as error:
            raise StorageError(f"cannot read {file}: {error.strerror or error}") from error
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise DamageError(
                f"{file} is damaged ({error}); the rest of the store can still be read"
            ) from error

    def open(self, path: str) -> "zarr.Array[Any]":
        """Opened once; two threads that meet here open it twice, which is harmless."""
        if path not in self._opened:
            self._opened[path] = zarr.open_array(self.path / path, mode="r", zarr_format=3)
        return self._opened[path]


def _runs(positions: Sequence[int], size: int | None = None) -> Iterator[tuple[slice, slice]]:
    """Runs of consecutive positions as (slice to read, slice to fill); none crosses a multiple of `size`."""
    begin = 0
    for end in range(1, len(positions) + 1):
        last = end == len(positions)
        if (
            last
            or positions[end] != positions[end - 1] + 1
            or (size is not None and positions[end] % size == 0)
        ):
            yield slice(positions[begin], positions[end - 1] + 1), slice(begin, end)
            begin = end
