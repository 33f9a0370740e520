"""Decoded samples that are kept, so that a small split is read only once."""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = tuple[int, int]
"""A sample's position in the split, and the variant in which it is read."""
Arrays = dict[str, NDArray[Any]]


class SampleMemory:
    """Decoded samples kept up to a limit in bytes; what no longer fits is read from the store again."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held_bytes = 0
        self._samples: dict[Row, Arrays] = {}
        self._lock = threading.Lock()

    def get(self, row: Row) -> Arrays | None:
        """The arrays of a sample, or None if it is not held."""
        return self._samples.get(row)

    def put(self, row: Row, arrays: Arrays) -> None:
        """Keep a sample if it still fits."""
        size = sum(array.nbytes for array in arrays.values())
        with self._lock:
            if row not in self._samples and self.held_bytes + size <= self.limit:
                self._samples[row] = {name: np.array(array) for name, array in arrays.items()}
                self.held_bytes += size
