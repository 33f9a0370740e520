"""Writes one shard as a stream: chunks are compressed by threads and appended in order, the index comes last.

At most AHEAD chunks are encoded or wait for their turn while another one is written, so a shard of any size
costs a few chunks of memory; and the bytes do not depend on how many threads there are.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .records import FileEntry
from .shards import ShardLayout, encode_chunk, encode_index

AHEAD = 4
"""Chunks. One in the making takes twice its size at worst: 57 MB for those of FLUX.1-dev at 512 px."""


def write_shard(
    root: Path, name: str, layout: ShardLayout, values: NDArray[Any], pool: Executor
) -> FileEntry:
    """Write the shard that holds `values`, durably, to root / name; its size and hash. OSErrors pass.

    `values` has the shard's shape. Chunks lie in the order of the index, without gaps.
    """
    if values.shape != layout.shard:
        raise ValueError(f"a shard of {list(layout.shard)} cannot hold {list(values.shape)}")
    digest, size = hashlib.sha256(), 0
    places: list[tuple[int, int]] = []
    with open(root / name, "xb") as file:
        for chunk in _encoded(layout, values, pool):
            places.append((size, len(chunk)))
            size += len(chunk)
            digest.update(chunk)
            file.write(chunk)
        index = encode_index(np.array(places, np.uint64))
        digest.update(index)
        file.write(index)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(path=name, size=size + len(index), sha256=digest.hexdigest())


def _encoded(layout: ShardLayout, values: NDArray[Any], pool: Executor) -> Iterator[bytes]:
    """The chunks of a shard, encoded, in order."""
    waiting: deque[Future[bytes]] = deque()
    for position in np.ndindex(*layout.grid):
        corner = zip(position, layout.chunk, strict=True)
        part = values[tuple(slice(at * size, (at + 1) * size) for at, size in corner)]
        if len(waiting) == AHEAD:
            yield waiting.popleft().result()
        waiting.append(pool.submit(encode_chunk, layout, part))
    while waiting:
        yield waiting.popleft().result()
