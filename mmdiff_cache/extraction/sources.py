"""Going on with a store: are its pictures still the same, and which failed ones can be read by now."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from mmdiff_cache.datasets.prompt_list import PromptList
from mmdiff_cache.errors import DataError
from mmdiff_cache.extraction.plan import ExtractionPlan
from mmdiff_cache.extraction.worker import UNREADABLE, Loaded, Unusable, load_batch
from mmdiff_cache.records import PictureRequest, PreparedSample
from mmdiff_cache.store.reader import SplitReader, Store
from mmdiff_cache.store.records import Partition

logger = logging.getLogger(__name__)


def check_unchanged(plan: ExtractionPlan, store: Store) -> None:
    """Compare one finished sample a split with its source, to notice another folder with the same names.

    Prompts cost nothing to compare, so all of them are. Raises DataError when picture and labels, or prompt
    and seed, are not those from which the sample was made.
    """
    for split in plan.samples:
        reader = store[split]
        finished = _in_plan(plan, split, reader.finished)
        for position in finished if isinstance(plan.dataset, PromptList) else islice(finished, 1):
            (found,) = load_batch(plan, split, [position])
            _check_same(found, reader, position, store.path)


def _check_same(found: Loaded, reader: SplitReader, position: int, path: Path) -> None:
    if isinstance(found, Unusable):
        raise DataError(f"sample {found.sample_id!r} of {path} can no longer be read: {found.reason}")
    if found.content_hash == reader.content_hash(position):
        return
    if isinstance(found, PictureRequest):
        raise DataError(
            f"sample {found.sample_id!r} of {path} was drawn from another prompt or seed than "
            f"{found.prompt!r} and {found.seed}; give those again, or another --store"
        )
    raise DataError(
        f"sample {found.sample_id!r} is not the picture from which {path} was made; "
        "give the same --data-root, or another --store for the changed pictures"
    )


def mended_partitions(plan: ExtractionPlan, store: Store) -> list[Partition]:
    """The finished partitions with a sample that could not be read then and can be now."""
    mended: list[Partition] = []
    for split in plan.samples:
        readable = set(_readable_by_now(plan, split, store[split]))
        for partition in store.manifest.partitions(split):
            again = [n for n in range(partition.start, partition.stop) if n in readable]
            if again and partition.stop <= len(plan.samples[split]):
                names = ", ".join(plan.samples[split][n] for n in again)
                logger.info("partition %s will be written again: %s can be read now", partition.name, names)
                mended.append(partition)
    return mended


def _readable_by_now(plan: ExtractionPlan, split: str, reader: SplitReader) -> Iterator[int]:
    unreadable = [n for n, reason in reader.failed.items() if reason.startswith(UNREADABLE)]
    for position in _in_plan(plan, split, unreadable):
        if isinstance(load_batch(plan, split, [position])[0], PreparedSample):
            yield position


def _in_plan(plan: ExtractionPlan, split: str, positions: "tuple[int, ...] | list[int]") -> Iterator[int]:
    return (position for position in positions if position < len(plan.samples[split]))
