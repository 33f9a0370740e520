"""What a worker of a cluster does: say what it is, get ready, extract one partition. Imports no dask.

A worker gets the resolved configuration, the name of a partition and little else; the sample ids it reads
from the store's manifest, the plan it makes itself, and that it agrees with the driver's is checked. Plan and
model are kept in this module from one task to the next. They are loaded in a task, where a failure is seen,
and where a worker that took a dead one's place loads them as well.
"""

import errno
import hashlib
import logging
import os
import socket
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmdiff_cache.backbones.pipeline import choose_device
from mmdiff_cache.backbones.text import SavedText
from mmdiff_cache.config import ExtractConfig, filled
from mmdiff_cache.errors import ClusterRefused, MMDiffError, StoreError
from mmdiff_cache.extraction.dispatch import Finished, Outcome, Troubled
from mmdiff_cache.extraction.extractor import Extractor
from mmdiff_cache.extraction.generation import Painter
from mmdiff_cache.extraction.identity import Surroundings, surroundings
from mmdiff_cache.extraction.plan import ExtractionPlan
from mmdiff_cache.extraction.plan import plan as make_plan
from mmdiff_cache.extraction.run import check_backbone, load_worker, memory_errors
from mmdiff_cache.extraction.text_pass import encode
from mmdiff_cache.extraction.worker import run_partition
from mmdiff_cache.store.manifest import MANIFEST, Manifest, read_manifest
from mmdiff_cache.store.partition import PartitionWriter
from mmdiff_cache.store.records import Partition, canonical
from mmdiff_cache.store.writer import valid_record

logger = logging.getLogger(__name__)

_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""What a file system on the network may say once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run as it travels to a worker with every task: some kilobytes."""

    config: ExtractConfig
    """Resolved."""
    counts: Mapping[str, int]
    """How many of the manifest's samples, from the first, by split."""
    manifest_sha256: str
    plan_sha256: str
    """`digest` of the driver's plan."""
    mark: str
    """A file that the driver made for this run, from the store's folder: who sees it sees the same disk."""
    where: Surroundings
    """What every worker must have in common."""
    profile: bool
    """Whether workers say where their time went."""
    text: str | None
    """The folder of encoded prompts, from the store's; None where workers keep the text encoders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a worker runs."""

    host: str
    kind: str
    """`cpu` or `cuda`."""
    device_id: str | None
    """UUID of the GPU that it uses."""
    surroundings: Surroundings


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ready:
    job: Job
    plan: ExtractionPlan
    manifest: Manifest
    extractor: Extractor | Painter


_preparing = threading.Lock()
_ready: _Ready | None = None
_loaded: tuple[tuple[Any, ...], Extractor | Painter] | None = None


def place(device: str) -> Place:
    """Where this process is; `device` as in the configuration."""
    chosen = choose_device(device)
    on_gpu = chosen.type == "cuda"
    return Place(
        host=socket.gethostname(),
        kind=chosen.type,
        device_id=str(torch.cuda.get_device_properties(chosen).uuid) if on_gpu else None,
        surroundings=surroundings(chosen.type),
    )


def digest(plan: ExtractionPlan) -> str:
    """SHA-256 (hex) of what a plan says of samples, arrays and prompts: two that agree extract the same."""
    said = [plan.samples, plan.schema.to_json(), plan.prompts.identity, asdict(plan.backbone)]
    return hashlib.sha256(canonical(said)).hexdigest()


def prepare(job: Job) -> None:
    """Make the plan and load the backbone, unless that was done before.

    Raises ClusterRefused when this process cannot do the job, BackboneError when the backbone cannot be
    loaded.
    """
    _prepared(job)


def encode_text(job: Job, pending: Sequence[Partition]) -> None:
    """Encode all prompts of these partitions into the job's folder; no worker has a model by then.

    Raises as `prepare` does, and StorageError when the disk refuses.
    """
    global _ready, _loaded
    _set_threads(job)
    with _preparing:
        _ready = _loaded = None  # of a run before, whose memory the encoders need
        plan, _ = _planned(job)
        encode(plan, pending, plan.store / str(job.text))


def extract_partition(job: Job, partition: Partition, again: bool) -> Outcome:
    """Extract one partition, write it, record it. Whatever goes wrong is told, nothing is raised.

    A partition that has its record already, because the task ran before and its answer was lost, is left
    alone unless it is to be done `again`.
    """
    try:
        ready = _prepared(job)
        root = ready.plan.store
        record = None if again else valid_record(root, ready.manifest, partition)
        if record is None:
            with PartitionWriter(root, ready.manifest, partition) as out, memory_errors(ready.plan):
                record = run_partition(ready.plan, ready.extractor, out, _ignore)
    except Exception as error:
        return _trouble(error)
    failed = [(s.sample_id, s.reason or "") for s in record.samples if s.state == "failed"]
    return Finished(
        samples=len(record.samples),
        failed=tuple(failed),
        size=sum(file.size for file in record.files),
        seconds=ready.extractor.profile.take(),
    )


def _ignore(samples: int) -> None:
    """Progress is told by partition: a call a batch would cross the network."""


def _prepared(job: Job) -> _Ready:
    global _ready
    _set_threads(job)
    with _preparing:
        if _ready is None or _ready.job != job:
            _ready = None  # so that two models are never in memory at once
            _ready = _get_ready(job)
        return _ready


def _get_ready(job: Job) -> _Ready:
    plan, manifest = _planned(job)
    extractor = _extractor(job, plan, manifest)
    extractor.profile.on = job.profile
    return _Ready(job=job, plan=plan, manifest=manifest, extractor=extractor)


def _planned(job: Job) -> tuple[ExtractionPlan, Manifest]:
    """The driver's plan, made here. Raises ClusterRefused when this process cannot make it."""
    logging.getLogger("mmdiff_cache").setLevel(logging.INFO)  # for the driver's log
    check_surroundings(job.where, surroundings(choose_device(job.config.device).type), me())
    manifest = _read_store(job)
    samples = {split: manifest.splits[split][:count] for split, count in job.counts.items()}
    try:
        plan = make_plan(job.config, samples)
    except MMDiffError as error:
        raise ClusterRefused(f"{me()} cannot make the plan of this run: {error}") from error
    if digest(plan) != job.plan_sha256:
        raise ClusterRefused(
            f"{me()} plans something else than this process: data set, prompts or backbone differ there"
        )
    return plan, manifest


def _set_threads(job: Job) -> None:
    """As many as in the driver: a sum of floating-point numbers depends on how it is divided.

    torch keeps the number by calling thread, so each task sets it.
    """
    if job.where.threads is not None:
        torch.set_num_threads(job.where.threads)


def me() -> str:
    """This worker, in messages."""
    return f"worker {os.getpid()} on {socket.gethostname()}"


def check_surroundings(asked: Surroundings, found: Surroundings, who: str) -> None:
    """Raise ClusterRefused when a worker has other versions or another attention backend than is asked."""
    for package, version in asked.versions.items():
        if found.versions.get(package) != version:
            raise ClusterRefused(
                f"{who} has {package} {found.versions.get(package)}, this run {version}; "
                "features would differ: install the same versions everywhere"
            )
    if (found.device == "cpu") != (asked.device == "cpu"):
        raise ClusterRefused(
            f"{who} computes on {found.device}, this run on {asked.device}; features would differ: choose "
            "workers of one kind, or --set device=cpu"
        )
    if found.attention_backend != asked.attention_backend:
        raise ClusterRefused(
            f"{who} has the attention backend {found.attention_backend}, this run {asked.attention_backend}; "
            "set DIFFUSERS_ATTN_BACKEND alike everywhere"
        )


def _read_store(job: Job) -> Manifest:
    """The manifest, where it is the driver's and the folder is the driver's too, and can be written."""
    root = Path(filled(job.config.store))
    same = (root / job.mark).exists()
    try:
        same = same and hashlib.sha256((root / MANIFEST).read_bytes()).hexdigest() == job.manifest_sha256
        manifest = read_manifest(root) if same else None
    except (OSError, StoreError):
        manifest = None
    if manifest is None:
        raise ClusterRefused(
            f"{me()} does not see the store {root} of this run; it must lie on a file system that all "
            "workers share, under the same path"
        )
    if not os.access(root / job.mark, os.W_OK):
        raise ClusterRefused(f"{me()} may not write to {root}; give its user the permission")
    return manifest


def _extractor(job: Job, plan: ExtractionPlan, manifest: Manifest) -> Extractor | Painter:
    """The model is kept for as long as runs ask for the same one; another takes its place in memory."""
    global _loaded
    nowhere = replace(plan.config, store=None, data_root=None, dataset="", splits=None, limit=None)
    key = (replace(nowhere, prompts="", batch_size=None, partition_size=None), manifest.identity, job.text)
    if _loaded is None or _loaded[0] != key:
        _loaded = None
        text = None
        if job.text is not None:
            text = SavedText(plan.store / job.text, device=choose_device(plan.config.device))
        extractor = load_worker(plan.config, plan.backbone, text)
        check_backbone(plan, extractor, manifest)
        _loaded = (key, extractor)
    return _loaded[1]


def _trouble(error: Exception) -> Troubled:
    """What went wrong, as plain values: an exception of a library may not survive the journey."""
    if isinstance(error, torch.AcceleratorError):
        logger.error("the GPU failed, a new process is started: %s", error)
        os._exit(1)  # after a CUDA error every call of a process fails, so it would fail all other partitions
    if not isinstance(error, MMDiffError):
        logger.error("%s", "".join(traceback.format_exception(error)))
    return Troubled(
        reason=str(error) if isinstance(error, MMDiffError) else f"{type(error).__name__}: {error}",
        error=error if isinstance(error, MMDiffError) else None,
        may_pass=not isinstance(error, MMDiffError) or _may_pass(error),
    )


def _may_pass(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError)) or getattr(error, "errno", None) in _PASSING:
            return True
        error = error.__cause__
    return False
