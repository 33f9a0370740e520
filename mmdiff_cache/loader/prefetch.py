"""Batches of a data set by number, read ahead by other threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from mmdiff_cache.errors import ConfigError

from .batch import Batch
from .dataset import CachedFeatureDataset
from .order import batch_positions, batches_per_epoch

PREFETCH_THREADS = 2
BATCHES_AHEAD = 2
"""Batches that wait in memory; one of eight FLUX.1-dev samples at 4 x 4 maps has 0.8 GB."""


def make_loader(
    dataset: CachedFeatureDataset,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    start: int = 0,
    steps: int | None = None,
    threads: int = PREFETCH_THREADS,
    ahead: int = BATCHES_AHEAD,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Batches number `start` to `start + steps`, counted over all epochs; by default to the end of an epoch.

    Each epoch is a true shuffle of the whole split, given by (seed, epoch) alone, so that a training that
    goes on at step n sees what it would have seen. At most `ahead` batches wait in memory while `threads`
    threads read on; see BatchSlots for how memory is used again.

    `batch_size` is that of one rank. The ranks divide each epoch among them, no sample lost or seen twice,
    and all count the same steps; in a short last batch, which `drop_last` leaves out, a rank may have fewer
    samples or, without any, no batch. Raises ConfigError for a rank that is none, or more ranks than
    samples.
    """
    count, together = len(dataset), batch_size * world_size
    if not 0 <= rank < world_size <= count:
        raise ConfigError(
            f"rank must be 0 to world_size - 1, and world_size at most the {count} samples, "
            f"got rank {rank} of {world_size}"
        )
    per_epoch = batches_per_epoch(count, together, drop_last=drop_last)
    stop = start + (per_epoch - start % per_epoch if steps is None else steps)
    mine = (step for step in range(start, stop) if step % per_epoch * together + rank < count)
    slots = dataset.slots(batch_size, kept=ahead + 2)

    def load(step: int) -> Batch:
        positions = batch_positions(
            step,
            count,
            batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        return dataset.batch(positions, slots, epoch=step // per_epoch)

    return _prefetched(load, mine, threads, ahead)


def _prefetched(
    load: Callable[[int], Batch], steps: Iterable[int], threads: int, ahead: int
) -> Iterator[Batch]:
    """Load batches in other threads, up to `ahead` of the one that is asked for."""
    waiting: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="mmdiff-loader") as pool:
        try:
            for step in steps:
                waiting.append(pool.submit(load, step))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
