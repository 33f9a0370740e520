"""Memory for batches of features, taken once and used again: fresh memory costs more than reading into it."""

import math
import weakref

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor


class BatchSlots:
    """A ring of slots, each lent as a tensor.

    A slot comes back when that tensor and everything that shares its memory (a view of torch's or NumPy's,
    what autograd has saved) is gone, so a batch that somebody holds is never overwritten; while all slots are
    out, new memory is taken. With CUDA the memory is pinned and torch's own cache does the same: it also
    waits for copies to a device that are still under way.
    """

    def __init__(self, sample: tuple[int, ...], batch_size: int, kept: int) -> None:
        """Slots for up to `batch_size` samples of shape `sample`; at most `kept` of them wait unused."""
        self._sample, self._batch_size, self._kept = sample, batch_size, kept
        self._free: list[NDArray[np.float16]] = []

    def take(self, samples: int) -> Float[Tensor, "B T L h w C"]:
        """A float16 tensor for so many samples, its values not set."""
        shape = (samples, *self._sample)
        if torch.cuda.is_available():
            return torch.empty(shape, dtype=torch.float16, pin_memory=True)
        try:
            slot = self._free.pop()
        except IndexError:
            slot = np.empty(self._batch_size * math.prod(self._sample), np.float16)
        lent = slot[: math.prod(shape)].reshape(shape)
        # The tensor's storage holds `lent`, and all that shares the memory holds the storage.
        weakref.finalize(lent, self._give_back, slot).atexit = False
        return torch.from_numpy(lent)

    def _give_back(self, slot: NDArray[np.float16]) -> None:
        """Called wherever the last reference goes, so it must not wait for a lock."""
        if len(self._free) < self._kept:
            self._free.append(slot)
