"""One partition from its pictures to its record: the unit of work, of completion and of redo."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from mmdiff_cache.config import filled
from mmdiff_cache.datasets.prompt_list import PromptList
from mmdiff_cache.datasets.transforms import prepare
from mmdiff_cache.errors import DataError
from mmdiff_cache.extraction.extractor import Extractor, failures
from mmdiff_cache.extraction.generation import Painter
from mmdiff_cache.extraction.plan import ExtractionPlan
from mmdiff_cache.records import FeatureBatch, PictureRequest, PreparedSample
from mmdiff_cache.store.partition import PartitionWriter
from mmdiff_cache.store.records import Record

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Unusable:
    """A sample that could not be read, and why."""

    sample_id: str
    reason: str


Loaded = PreparedSample | PictureRequest | Unusable
UNREADABLE = "cannot be read: "
"""How the reason of a sample begins that may be mended by mending its file."""


def run_partition(
    plan: ExtractionPlan,
    extractor: Extractor | Painter,
    writer: PartitionWriter,
    advance: Callable[[int], None],
) -> Record:
    """Extract every sample of the writer's partition and commit it.

    Batches are cut from the plan and each fills the whole batch size, so a sample's features do not depend on
    what else is left to do. While the model computes one batch, the next is read and the one before it is
    compressed and staged, so two batches are in memory besides it. Of two partitions in one process, one
    computes while the other is committed. `advance` is told the samples of each
    batch once they are staged. A sample that cannot be read, or whose features are not finite, is
    recorded as failed.
    """
    partition, size = writer.partition, filled(plan.config.batch_size)
    timing = extractor.profile.timing
    starts = range(partition.start, partition.stop, size)

    def load(start: int) -> list[Loaded]:
        with timing("reading"):
            return load_batch(plan, partition.split, range(start, min(start + size, partition.stop)))

    def stage(start: int, computed: _Computed) -> int:
        with timing("staging"):
            return _stage(extractor, writer, start - partition.start, computed)

    def wait(future: Future[T]) -> T:
        with timing("waiting"):
            return future.result()

    with (
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader,
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="stage") as stager,
    ):
        ahead, behind = reader.submit(load, starts[0]), None
        with extractor.turn:
            for start in starts:
                batch = wait(ahead)
                if start + size < partition.stop:
                    ahead = reader.submit(load, start + size)
                computed = _compute(plan, extractor, batch)
                if behind is not None:
                    advance(wait(behind))
                behind = stager.submit(stage, start, computed)
        if behind is not None:
            advance(wait(behind))
    with timing("staging"):
        return writer.commit()


def load_batch(plan: ExtractionPlan, split: str, indices: Sequence[int]) -> list[Loaded]:
    """Read and prepare samples; one that cannot be used is said to be so in its place."""
    return [_load(plan, split, index) for index in indices]


def _load(plan: ExtractionPlan, split: str, index: int) -> Loaded:
    position = plan.positions[split][index]
    if isinstance(plan.dataset, PromptList):
        return plan.dataset.request(position, filled(plan.config.generation).seed)
    try:
        sample = plan.dataset.load(split, position)
        return prepare(
            sample,
            filled(plan.config.resolution),
            plan.prompts.prompt(sample),
            fit=plan.config.fit,
            specs=plan.dataset.label_specs,
        )
    except DataError as error:
        return Unusable(sample_id=plan.samples[split][index], reason=f"{UNREADABLE}{error}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Computed:
    """What came of a batch: samples, a wait for their features, and why some cannot be stored."""

    ids: tuple[str, ...]
    samples: Sequence[PreparedSample]
    """Those of the batch, another in the place of one that could not be read."""
    features: Callable[[], FeatureBatch] | None
    reasons: dict[int, str]
    """By position in the batch."""


def _compute(plan: ExtractionPlan, extractor: Extractor | Painter, batch: Sequence[Loaded]) -> _Computed:
    """One pass of the whole batch size; samples that cannot be used are stood in for by another."""
    ids = tuple(loaded.sample_id for loaded in batch)
    usable = [loaded for loaded in batch if not isinstance(loaded, Unusable)]
    reasons = {position: bad.reason for position, bad in enumerate(batch) if isinstance(bad, Unusable)}
    if not usable:
        return _Computed(ids=ids, samples=(), features=None, reasons=reasons)
    passing = [usable[0] if isinstance(loaded, Unusable) else loaded for loaded in batch]
    passing += [usable[0]] * (filled(plan.config.batch_size) - len(batch))
    if isinstance(extractor, Painter):
        samples, drawn = extractor([one for one in passing if isinstance(one, PictureRequest)])
        return _Computed(ids=ids, samples=samples, features=lambda: drawn, reasons=reasons)
    samples = [one for one in passing if isinstance(one, PreparedSample)]
    return _Computed(ids=ids, samples=samples, features=extractor.begin(samples), reasons=reasons)


def _stage(extractor: Extractor | Painter, writer: PartitionWriter, offset: int, computed: _Computed) -> int:
    """Give a batch to the store; how many samples it had."""
    features, reasons = None, computed.reasons
    if computed.features is not None:
        features = computed.features()
        reasons = failures(features, extractor.layers, extractor.timesteps) | reasons
    for position, sample_id in enumerate(computed.ids):
        if position in reasons:
            writer.fail(offset + position, sample_id, reasons[position])
        elif features is not None:
            writer.write(offset + position, [computed.samples[position]], _row(features, position))
    return len(computed.ids)


def _row(features: FeatureBatch, position: int) -> FeatureBatch:
    """The features of one sample, as a batch of one."""
    row = slice(position, position + 1)
    return FeatureBatch(
        hidden_states=features.hidden_states[row],
        concept_scores={name: scores[row] for name, scores in features.concept_scores.items()},
        concept_maps={name: maps[row] for name, maps in features.concept_maps.items()},
        latents=features.latents[row],
        audit=features.audit[row],
        discriminative={name: maps[row] for name, maps in features.discriminative.items()},
        cross_attention=None if features.cross_attention is None else features.cross_attention[row],
        sigmas=None if features.sigmas is None else features.sigmas[row],
    )
