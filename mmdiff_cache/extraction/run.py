"""Stage one from beginning to end: open the store, extract what is not there yet, hand the store back."""

import logging
import time
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from mmdiff_cache.backbones.info import BackboneInfo
from mmdiff_cache.backbones.registry import load_backbone
from mmdiff_cache.backbones.text import TextSource
from mmdiff_cache.config import ExtractConfig, filled
from mmdiff_cache.errors import BackboneError
from mmdiff_cache.extraction.compilation import compile_blocks, compile_errors
from mmdiff_cache.extraction.extractor import Extractor
from mmdiff_cache.extraction.identity import build_manifest
from mmdiff_cache.extraction.plan import ExtractionPlan, check_disk
from mmdiff_cache.extraction.plan import plan as make_plan
from mmdiff_cache.extraction.profile import Profile
from mmdiff_cache.extraction.sources import check_unchanged, mended_partitions
from mmdiff_cache.extraction.text_pass import text_of
from mmdiff_cache.extraction.worker import run_partition
from mmdiff_cache.records import Progress
from mmdiff_cache.store.reader import Store, open_store
from mmdiff_cache.store.records import Partition
from mmdiff_cache.store.writer import StoreWriter, open_writer

logger = logging.getLogger(__name__)


def extract(
    plan: ExtractionPlan | ExtractConfig,
    progress: Progress | None = None,
    *,
    append: bool = False,
    redo: Collection[str] = (),
    profile: Profile | None = None,
) -> Store:
    """Run the backbone over the planned samples and return their store. Safe to run again, and to interrupt.

    Finished partitions are kept and skipped; the backbone is loaded only when something is left to do.
    Samples that could not be used are in the store as failed, each with its reason; the run goes on past
    them, and a later one tries them again if their files can be read by then. An interruption loses at most
    the partition it fell into. With `append`, samples that the store was not planned with are added to it.
    `redo` names partitions to extract again although they are recorded, as
    repair asks. `progress` is called with samples done, all samples, and the speed; `profile` adds up
    where the time went, which also goes into the log.

    Raises DataError when a source changed since it was extracted, StorageError when the disk is too small or
    refuses, StoreError when the folder holds something else, BackboneError when weights are missing or the
    GPU's memory is too small.
    """
    if isinstance(plan, ExtractConfig):
        plan = make_plan(plan)
    check_disk(plan)
    manifest = build_manifest(plan)
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
            _run(plan, writer, pending, progress or _silent, profile)
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
    backbone = load_backbone(
        info,
        layers=layers,
        device=config.device,
        dtype=config.dtype,
        quantisation=config.quantisation or "none",
        text_length=config.text_length,
        text=text,
    )
    if config.attention is not None:
        backbone.use_attention(config.attention)
    if config.compile:
        compile_blocks(backbone.blocks, concepts=bool(config.concepts))
    return Extractor(
        backbone,
        layers=layers,
        timesteps=filled(config.timesteps),
        vocabularies=filled(config.concepts),
        noise=config.noise,
        guidance=config.guidance,
        profile=profile,
    )


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
        extractor = load_extractor(plan.config, plan.backbone, text, profile)
        _check_backbone(plan, extractor, writer)
        with profile.timing_all():
            _extract_all(plan, extractor, writer, pending, progress)


def _extract_all(
    plan: ExtractionPlan,
    extractor: Extractor,
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

    for partition in pending:
        with writer.begin(partition) as out, _memory_errors(plan), compile_errors():
            record = run_partition(plan, extractor, out, advance)
        for sample in record.samples:
            if sample.state == "failed":
                logger.warning("sample %s failed: %s", sample.sample_id, sample.reason)
        logger.info("partition %s is complete", partition.name)


def _check_backbone(plan: ExtractionPlan, extractor: Extractor, writer: StoreWriter) -> None:
    """Its files may have changed since they were hashed for the manifest."""
    for name, value in extractor.backbone.identity().items():
        if writer.manifest.identity[name] != value:
            raise BackboneError(
                f"{plan.backbone.name} changed while it was loaded: its {name} was "
                f"{writer.manifest.identity[name]}, is {value}; run again when its files are complete"
            )


@contextmanager
def _memory_errors(plan: ExtractionPlan) -> Generator[None]:
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
        logger.info("stopped: %s", error or type(error).__name__)
        raise
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()


def _silent(done: int, total: int, state: str) -> None:
    """No progress wanted."""
