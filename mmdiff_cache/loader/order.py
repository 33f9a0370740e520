"""Which sample comes when, in which variant, and beside whose maps: functions of seeds and numbers alone."""

import numpy as np
from numpy.typing import NDArray

PARTNERS_STREAM = 2**63 + 1
"""Number of the random stream that deals out maps; epochs count from 0 and never reach it."""
VARIANT_BLOCK = 2**32
"""Where the counter of a sample's own stream starts, far from where a shuffle of the same key reads."""


def sample_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of 0..count-1 over the whole split, the same for the same (seed, epoch) everywhere."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return generator.permutation(count).astype(np.int64)


def drawn_variant(sample: int, count: int, *, seed: int, epoch: int) -> int:
    """Which of `count` variants a sample (its position in the split) is read in, from 0.

    A function of (seed, epoch, sample) alone: the order of the samples, and which others there are, do not
    matter.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, sample, VARIANT_BLOCK], dtype=np.uint64)
    return int(np.random.Philox(key=key, counter=counter).random_raw()) * count >> 64


def partners(count: int) -> NDArray[np.int64]:
    """For each of 0..count-1 another one, never itself; each is the partner of exactly one."""
    order = sample_order(count, seed=0, epoch=PARTNERS_STREAM)
    found = np.empty(count, np.int64)
    found[order] = np.roll(order, -1)
    return found


def batches_per_epoch(count: int, batch_size: int, *, drop_last: bool) -> int:
    """How many batches one pass over `count` samples has; at least one, so that a tiny split still trains."""
    return max(1, count // batch_size if drop_last else -(-count // batch_size))


def batch_positions(
    step: int,
    count: int,
    batch_size: int,
    *,
    seed: int,
    shuffle: bool,
    drop_last: bool,
    rank: int = 0,
    world_size: int = 1,
) -> NDArray[np.int64]:
    """The data set's positions that make up batch number `step`, counted from 0 over all epochs.

    Of several ranks each takes every `world_size`-th of the `batch_size * world_size` samples of a step, so
    that together they see what one process with a batch of that size would see.
    """
    together = batch_size * world_size
    epoch, number = divmod(step, batches_per_epoch(count, together, drop_last=drop_last))
    order = sample_order(count, seed=seed, epoch=epoch) if shuffle else np.arange(count)
    return order[number * together : (number + 1) * together][rank::world_size]
