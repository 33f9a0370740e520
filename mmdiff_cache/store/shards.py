"""A shard of Zarr's sharding codec as bytes: encoded chunks one after the other, then the index.

Only what our own arrays use is known here: little-endian values, Blosc, crc32c, the index at the end. A
reader that meets anything else leaves it to zarr. docs/cache-format.md has the same in words.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, cast

import google_crc32c
import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

CHECKSUM_BYTES = 4
EMPTY = 2**64 - 1
"""Offset and length of a chunk that was never written."""
_BLOSC_HEADER = 16
blosc: Any = numcodecs.blosc
_SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
_BYTE_ORDERS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "bytes"}]
"""Of values of several bytes, and of those of one, which have none."""
_INDEX_CODECS = [_BYTE_ORDERS[0], {"name": "crc32c"}]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLayout:
    """How the chunks of one array lie in its shards, and how they are encoded."""

    dtype: "np.dtype[Any]"
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    compressor: str
    level: int
    shuffle: int
    block: int

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks of a shard along each axis."""
        return tuple(whole // part for whole, part in zip(self.shard, self.chunk, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of every shard."""
        return 16 * math.prod(self.grid) + CHECKSUM_BYTES

    def locate(self, position: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Position of the shard, and number of the chunk in it, that hold the value at a position."""
        outer = tuple(at // size for at, size in zip(position, self.shard, strict=True))
        sizes = zip(position, self.shard, self.chunk, strict=True)
        inner = tuple(at % whole // part for at, whole, part in sizes)
        return outer, int(np.ravel_multi_index(inner, self.grid))


def parse_layout(metadata: bytes) -> ShardLayout | None:
    """The layout that a zarr.json states; None where it has anything that is not known here."""
    try:
        stated = json.loads(metadata)
        (sharding,) = stated["codecs"]
        inner = sharding["configuration"]
        order, compressor, checksum = inner["codecs"]
        dtype = np.dtype(stated["data_type"])
        known = (
            sharding["name"] == "sharding_indexed"
            and inner["index_location"] == "end"
            and inner["index_codecs"] == _INDEX_CODECS
            and order == _BYTE_ORDERS[dtype.itemsize == 1]
            and compressor["name"] == "blosc"
            and checksum == {"name": "crc32c"}
            and not stated.get("storage_transformers")
        )
        settings = compressor["configuration"]
        if not known or settings["typesize"] != dtype.itemsize:
            return None
        return ShardLayout(
            dtype=dtype,
            shard=tuple(stated["chunk_grid"]["configuration"]["chunk_shape"]),
            chunk=tuple(inner["chunk_shape"]),
            compressor=settings["cname"],
            level=settings["clevel"],
            shuffle=_SHUFFLES[settings["shuffle"]],
            block=settings["blocksize"],
        )
    except (KeyError, TypeError, ValueError):
        return None


def encode_chunk(layout: ShardLayout, values: NDArray[Any]) -> bytes:
    """The bytes of one chunk in its shard."""
    packed = cast(
        bytes,
        blosc.compress(
            np.ascontiguousarray(values, layout.dtype.newbyteorder("<")).reshape(-1),
            layout.compressor.encode(),
            layout.level,
            layout.shuffle,
            layout.block,
        ),
    )
    return packed + _checksum(packed)


def decode_chunk(layout: ShardLayout, data: bytes, out: NDArray[Any]) -> None:
    """Decode one chunk into `out`, contiguous and as large as one. Raises ValueError for damaged bytes."""
    packed = np.frombuffer(data, np.uint8)[:-CHECKSUM_BYTES]  # a view: a slice of bytes would be a copy
    if len(packed) < _BLOSC_HEADER or _checksum(packed) != data[-CHECKSUM_BYTES:]:
        raise ValueError("the checksum of a chunk is wrong")
    _, values, _, size = (int(number) for number in packed[:_BLOSC_HEADER].view("<u4"))
    if (values, size) != (out.nbytes, len(packed)):
        raise ValueError("a chunk does not have the size that its array states")
    blosc.decompress(packed, out)


def encode_index(places: NDArray[np.uint64]) -> bytes:
    """The index of a shard; `places` is [chunk, 2]: offset and length."""
    packed = places.astype("<u8").tobytes()
    return packed + _checksum(packed)


def decode_index(layout: ShardLayout, data: bytes, file_bytes: int) -> NDArray[np.uint64]:
    """Offset and length of every chunk, [chunk, 2]; EMPTY for those behind the array's end.

    Raises ValueError unless all others lie within the file.
    """
    packed, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if len(data) != layout.index_bytes or _checksum(packed) != checksum:
        raise ValueError("the checksum of its index is wrong")
    places = np.frombuffer(packed, "<u8").reshape(-1, 2)
    offsets, lengths = places[(places != EMPTY).any(axis=1)].T
    room = np.uint64(file_bytes - layout.index_bytes)
    if bool(((offsets > room) | (lengths > room - np.minimum(offsets, room))).any()):
        raise ValueError("its index points outside of the file")
    return places


def _checksum(data: "bytes | NDArray[np.uint8]") -> bytes:
    return google_crc32c.value(data).to_bytes(CHECKSUM_BYTES, "little")
