"""Which samples of the training split are trained on, and which are held out.

All samples stand in one seeded permutation; a limit takes the first of it, and the place in it decides what
is held out. So the training samples of a smaller limit are among those of a larger one, and so are the
held-out ones, whatever the seed of a run. Paper: App. A. Where several tasks share the samples out
(`disjoint`), they are dealt in the order of that permutation, so the same holds for those of each task.
"""

from dataclasses import dataclass

import numpy as np

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.loader import sample_order, usable_samples
from mmdiff_cache.store.reader import SplitReader

SUBSET_STREAM = 2**63
"""Number of the random stream that permutes the split; epochs count from 0 and never reach it."""
DECIMALS = 9
"""To which a share of a count is rounded, lest 0.1 of 10 be a little more than 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """Positions in the split, in its order."""

    trained: tuple[int, ...]
    held_out: tuple[int, ...]


def divide(config: TrainConfig, reader: SplitReader, label: str, turn: tuple[int, int] = (0, 1)) -> Division:
    """The samples of a training; failed ones are left out, wherever they fell.

    `turn` = (n, of) takes the n-th sample, from 0, of every `of`: what one of so many tasks gets. Raises
    StoreIncomplete naming the first sample among them that was never finished, ConfigError if none is left to
    train on, or to hold out.
    """
    number, of = turn
    order = sample_order(len(reader), seed=config.subset_seed, epoch=SUBSET_STREAM)[: config.limit]
    usable = frozenset(usable_samples(reader, sorted(order.tolist()), (label,)))
    held = held_out_places(len(order), config.holdout)
    trained, held_out = (
        tuple(sorted(usable.intersection(order[chosen][number::of].tolist()))) for chosen in (~held, held)
    )
    if not trained or (config.holdout and not held_out):
        dealt = "" if of == 1 else f", dealt out to {of} tasks,"
        raise ConfigError(
            f"holding out {config.holdout:g} of {len(usable)} sample(s){dealt} "
            f"{'finds none to hold out' if trained else 'leaves none to train on'} for {config.task}; "
            "take more samples, another holdout, or --set holdout=0"
        )
    return Division(trained=trained, held_out=held_out)


def held_out_places(count: int, share: float) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Which of `count` places are held out: evenly spread, the first of them place 0.

    Place i is one where the share of the places up to it, rounded up, grows; so at least one is held out, and
    fewer places have the same ones.
    """
    upto = np.ceil(np.round(np.arange(count + 1) * share, DECIMALS))
    return np.diff(upto) > 0


def samples_of_the_split(reader: SplitReader, label: str) -> int:
    """How many samples a training without a limit can read, once all are finished."""
    states = ({reader.state(n), reader.state(n, label)} for n in range(len(reader)))
    return sum("failed" not in state for state in states)
