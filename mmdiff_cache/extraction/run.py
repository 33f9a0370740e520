"""Stage one from beginning to end: open the store, extract what is not there yet, hand the store back."""

import logging
import time
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmdiff_cache.backbones.info import BackboneInfo
from mmdiff_cache.backbones.registry import load_backbone
from mmdiff_cache.backbones.text import TextSource
from mmdiff_cache.config import ExtractConfig, filled
from mmdiff_cache.encoders.registry import describe_encoder, load_encoder
from mmdiff_cache.errors import BackboneError, ConfigError
from mmdiff_cache.extraction.compilation import compile_blocks, compile_errors
from mmdiff_cache.extraction.cost import operations_a_sample
from mmdiff_cache.extraction.extractor import Extractor
from mmdiff_cache.extraction.generation import Painter
from mmdiff_cache.extraction.identity import Surroundings, build_manifest
from mmdiff_cache.extraction.measured import Measured, beside, keep_measured
from mmdiff_cache.extraction.placement import open_cluster
from mmdiff_cache.extraction.plan import ExtractionPlan, check_disk
from mmdiff_cache.extraction.plan import plan as make_plan
from mmdiff_cache.extraction.profile import Profile
from mmdiff_cache.extraction.sources import check_unchanged, mended_partitions
from mmdiff_cache.extraction.text_pass import text_of
from mmdiff_cache.extraction.variants import variants_of
from mmdiff_cache.extraction.worker import run_partition
from mmdiff_cache.records import Progress
from mmdiff_cache.store.arrays import arrays, hidden_states
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.reader import Store, open_store
from mmdiff_cache.store.records import Partition, Record
from mmdiff_cache.store.schema import StoreSchema
from mmdiff_cache.store.writer import StoreWriter, open_writer

if TYPE_CHECKING:
    from distributed import Client
else:
    Client = Any

logger = logging.getLogger(__name__)


def extract(
    plan: ExtractionPlan | ExtractConfig,
    progress: Progress | None = None,
    *,
    append: bool = False,
    redo: Collection[str] = (),
    force: bool = False,
    workers: int | None = None,
    client: Client | None = None,
    profile: Profile | None = None,
) -> Store:
    """Run the backbone over the planned samples and return their store. Safe to run again, and to interrupt.

    Finished partitions are kept and skipped; the backbone is loaded only when something is left to do.
    Samples that could not be used are in the store as failed, each with its reason; the run goes on past
    them, and a later one tries them again if their files can be read by then. An interruption loses at most
    the partition it fell into. With `append`, samples that the store was not planned with are added to it.
    `redo` names partitions to extract again although they are recorded, as repair asks. `force` starts on a
    disk that seems too small. `progress` is called with samples done, all samples, and the speed; `profile`
    adds up where the time went, that of workers too, which also goes into the log.

    Several visible GPUs are all used, each by a process of its own; `workers` says how many processes there
    are, on CPUs too, and 0 that all is done in this one. `client` is that of a dask cluster to use instead,
    which is left running. The bytes are the same wherever they are made (docs/clusters.md).

    Raises DataError when a source changed since it was extracted, StorageError when the disk is too small or
    refuses, StoreError when the folder holds something else, BackboneError when weights are missing or the
    GPU's memory is too small, ExtractionError when a partition ended its process again and again,
    ClusterRefused and ClusterError when a cluster cannot do the work or is lost.
    """
    if isinstance(plan, ExtractConfig):
        plan = make_plan(plan)
    if not force:
        check_disk(plan)
    if client is not None and workers is not None:
        raise ConfigError("workers starts a cluster and client is one; give one of them")
    with open_cluster(plan.config, workers) if client is None else nullcontext(client) as client:
        where = None if client is None else _look_at(client, plan)
        return _extract(plan, progress or _silent, append, redo, client, where, profile)


def _look_at(client: Client, plan: ExtractionPlan) -> Surroundings:
    """What the workers of a cluster have in common. Refuses those that do not fit, before all else."""
    from mmdiff_cache.extraction.cluster import in_common, survey

    return in_common(survey(client, plan.config.device))


def _extract(
    plan: ExtractionPlan,
    progress: Progress,
    append: bool,
    redo: Collection[str],
    client: Client | None,
    where: Surroundings | None,
    profile: Profile | None,
) -> Store:
    manifest = build_manifest(plan, where)
    with open_writer(plan.store, manifest, append=append) as writer, _log_file(plan.store):
        pending = [partition for split in plan.samples for partition in writer.pending(split)]
        before = open_store(plan.store)
        check_unchanged(plan, before)
        again = [p for split in plan.samples for p in before.manifest.partitions(split) if p.name in redo]
        again += mended_partitions(plan, before)
        pending += [partition for partition in dict.fromkeys(again) if partition not in pending]
        left = sum(partition.size for partition in pending)
        if pending:
            logger.info("%d of %d samples to extract\n%s", left, plan.total, plan)
            profile = profile or Profile(on=False)
            if client is None or where is None:
                _run(plan, writer, pending, progress, profile)
            else:
                from mmdiff_cache.extraction.cluster_run import run_on_cluster

                run_on_cluster(client, where, plan, writer, pending, again, progress, profile)
            if profile.on:
                logger.info("where the time went\n%s", profile)
    return open_store(plan.store)


def load_extractor(
    config: ExtractConfig,
    info: BackboneInfo,
    text: TextSource | None = None,
    profile: Profile | None = None,
) -> Extractor:
    """Load a backbone for a resolved configuration, set up to capture what is configured.

    With `text`, its text encoders are left out.
    """
    layers = filled(config.layers)
    needed = layers if config.generation is None else None  # drawing takes all blocks
    backbone = load_backbone(
        info,
        layers=needed,
        device=config.device,
        dtype=config.dtype,
        quantisation=config.quantisation or "none",
        text_length=config.text_length,
        text=text,
    )
    if config.attention is not None:
        backbone.use_attention(config.attention)
    if config.compile:
        compile_blocks(backbone.blocks, read_inside=bool(config.concepts) or config.cross_attention)
    return Extractor(
        backbone,
        layers=layers,
        timesteps=filled(config.timesteps),
        vocabularies=filled(config.concepts),
        noise=config.noise,
        guidance=config.guidance,
        variants=variants_of(config.draws, flip=config.flip),
        cross_attention=config.cross_attention,
        encoders=[
            load_encoder(describe_encoder(name), device=backbone.device) for name in config.discriminative
        ],
        profile=profile,
    )


def check_encoders(extractor: Extractor | Painter, schema: StoreSchema) -> None:
    """Raise BackboneError unless the loaded encoders are those whose features a store holds."""
    stored = {encoder.name: encoder.weights_sha256 for encoder in schema.discriminative}
    for encoder in extractor.encoders:
        name, found = encoder.info.name, encoder.weights_sha256
        if stored.get(name) != found:
            raise BackboneError(
                f"the store has features of another {name}: its weights_sha256 was {stored.get(name)}, is "
                f"{found}; put the former weights back, or extract into another folder"
            )


def load_worker(
    config: ExtractConfig,
    info: BackboneInfo,
    text: TextSource | None = None,
    profile: Profile | None = None,
) -> Extractor | Painter:
    """What turns the samples of a resolved configuration into features; see `load_extractor`."""
    extractor = load_extractor(config, info, text, profile)
    if config.generation is None:
        return extractor
    return Painter(extractor, config.generation, resolution=filled(config.resolution))


def _run(
    plan: ExtractionPlan,
    writer: StoreWriter,
    pending: list[Partition],
    progress: Progress,
    profile: Profile,
) -> None:
    done = plan.total - sum(partition.size for partition in pending)
    progress(done, plan.total, f"loading {plan.backbone.name}")
    with text_of(plan, pending) as text:
        extractor = load_worker(plan.config, plan.backbone, text, profile)
        check_backbone(plan, extractor, writer.manifest)
        with profile.timing_all():
            _extract_all(plan, extractor, writer, pending, progress)


def _extract_all(
    plan: ExtractionPlan,
    extractor: Extractor | Painter,
    writer: StoreWriter,
    pending: list[Partition],
    progress: Progress,
) -> None:
    done = plan.total - sum(partition.size for partition in pending)
    begun, first = time.monotonic(), done

    def advance(samples: int) -> None:
        nonlocal done
        done += samples
        speed = (done - first) / (time.monotonic() - begun)
        progress(done, plan.total, f"{partition.split}, {speed:.3g} samples/s")

    records: list[Record] = []
    for partition in pending:
        with writer.begin(partition) as out, memory_errors(plan), compile_errors():
            records.append(run_partition(plan, extractor, out, advance))
        for sample in records[-1].samples:
            if sample.state == "failed":
                logger.warning("sample %s failed: %s", sample.sample_id, sample.reason)
        logger.info("partition %s is complete", partition.name)
    keep_measured(plan.store, measure(plan, records, time.monotonic() - begun, plan.cost.machine))


def measure(plan: ExtractionPlan, records: Sequence[Record], seconds: float, machine: str) -> Measured:
    """What a run of these records shows of a machine's speed and the codec's worth."""
    config, samples = plan.config, sum(len(record.samples) for record in records)
    hidden = [file for record in records for file in record.files if "/hidden_states/" in file.path]
    hidden_bytes = sum(file.size for file in hidden)
    other_bytes = sum(file.size for record in records for file in record.files) - hidden_bytes
    raw = hidden_states(replace(plan.schema, codec="zstd"), 1).nbytes / len(plan.schema.variants)
    others = [s for s in arrays(plan.schema, samples) if s.reach != "array" and s.path != "hidden_states"]
    return Measured(
        dataset=config.dataset,
        backbone=filled(config.backbone),
        dtype=filled(config.dtype),
        machine=machine,
        resolution=filled(config.resolution),
        batch_size=filled(config.batch_size),
        codec=config.codec,
        beside=beside(config),
        samples=samples,
        operations_per_second=operations_a_sample(config, plan.backbone) * samples / seconds,
        bytes_ratio=raw * len(hidden) / max(1, hidden_bytes),
        others_ratio=sum(spec.nbytes for spec in others) / max(1, other_bytes),
    )


def check_backbone(plan: ExtractionPlan, extractor: Extractor | Painter, manifest: Manifest) -> None:
    """Raise BackboneError when it is not the one of the manifest.

    Its files may have changed since they were hashed for the manifest."""
    for name, value in extractor.backbone.identity().items():
        if manifest.identity[name] != value:
            raise BackboneError(
                f"{plan.backbone.name} changed while it was loaded: its {name} was "
                f"{manifest.identity[name]}, is {value}; run again when its files are complete"
            )
    check_encoders(extractor, manifest.schema)


@contextmanager
def memory_errors(plan: ExtractionPlan) -> Generator[None]:
    """Turn the GPU's lack of memory into a BackboneError with the remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = max(1, filled(plan.config.batch_size) // 2)
        raise BackboneError(
            f"the GPU has too little memory for {plan.config.batch_size} samples at once; "
            f"run again with --batch-size {smaller}, which keeps what is done"
        ) from error


@contextmanager
def _log_file(store: Path) -> Generator[None]:
    """Write the package's log to the store's logs folder as well, while a run goes on."""
    package = logging.getLogger("mmdiff_cache")
    handler = logging.FileHandler(store / "logs" / "extract.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(min(package.getEffectiveLevel(), logging.INFO))
    try:
        yield
    except BaseException as error:
        logger.info("stopped: %s", str(error) or type(error).__name__)
        raise
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()


def _silent(done: int, total: int, state: str) -> None:
    """No progress wanted."""
