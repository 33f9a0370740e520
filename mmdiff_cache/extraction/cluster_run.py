"""A run of stage one on the workers of a dask cluster."""

import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from distributed import Client

from mmdiff_cache.errors import ExtractionError
from mmdiff_cache.extraction.crew import DaskCrew
from mmdiff_cache.extraction.dispatch import Finished, Outcome, Task, dispatch
from mmdiff_cache.extraction.identity import Surroundings
from mmdiff_cache.extraction.measured import keep_measured
from mmdiff_cache.extraction.plan import ExtractionPlan
from mmdiff_cache.extraction.profile import Profile
from mmdiff_cache.extraction.remote import Job, digest
from mmdiff_cache.extraction.run import measure
from mmdiff_cache.records import Progress
from mmdiff_cache.store.files import STAGING, clear_staging, staging_folder, storage_errors, write_durably
from mmdiff_cache.store.manifest import MANIFEST
from mmdiff_cache.store.records import Partition
from mmdiff_cache.store.writer import StoreWriter, valid_record

logger = logging.getLogger(__name__)

NAMED = 5
"""How many failed partitions are named; the log names all."""


def run_on_cluster(
    client: Client,
    where: Surroundings,
    plan: ExtractionPlan,
    writer: StoreWriter,
    pending: Sequence[Partition],
    again: Sequence[Partition],
    progress: Progress,
    profile: Profile,
) -> None:
    """Extract the pending partitions on the workers, those of `again` although they have records.

    Speed and sizes are left in the store for later plans.

    Raises ExtractionError when some failed again and again, after all others are finished; KeyboardInterrupt
    after Ctrl-C, when what was under way has ended; StorageError and other errors that end a run.
    """
    with _mark(writer.path) as mark, _text_folder(plan) as text, _worker_logs(client):
        crew = DaskCrew(client, _job(plan, writer, where, mark, text, profile.on))
        report = _Report(plan, pending, crew, progress, profile)
        if text is not None:
            report.say("encoding the prompts on one worker, before the transformer is loaded")
            crew.encode_text(pending)
        report.say(f"loading {plan.backbone.name} on {crew.workers} workers")
        crew.prepare()
        report.begin()
        workers = crew.workers
        tasks = [Task(partition=partition, again=partition in again) for partition in pending]
        failed = dispatch(tasks, crew, report.settled, report.say)
        profile.wall += report.seconds * workers
        _keep_measured(plan, writer, where, report, workers)
        clear_staging(writer.path)  # of workers that died: nothing is under way any more
    if failed:
        names = [*list(failed)[:NAMED], *(["..."] if len(failed) > NAMED else [])]
        raise ExtractionError(
            f"{len(failed)} of {len(pending)} partitions could not be extracted ({', '.join(names)}: "
            f"{next(iter(failed.values()))}); all others are finished, and the same command tries these again"
        )


class _Report:
    """Tells progress and log what became of each partition."""

    def __init__(
        self,
        plan: ExtractionPlan,
        pending: Sequence[Partition],
        crew: DaskCrew,
        progress: Progress,
        profile: Profile,
    ) -> None:
        self._plan, self._crew, self._progress, self._profile = plan, crew, progress, profile
        self.finished: list[Partition] = []
        self._done = plan.total - sum(partition.size for partition in pending)
        self._samples, self._bytes, self._failed, self._begun = 0, 0, 0, time.monotonic()

    def say(self, state: str) -> None:
        self._progress(self._done + self._samples, self._plan.total, state)

    def begin(self) -> None:
        """From now on time counts for the speed."""
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since `begin`."""
        return max(time.monotonic() - self._begun, 1e-3)

    def settled(self, task: Task, outcome: Outcome) -> None:
        """Log how a partition ended; what failed is logged where it is decided."""
        if isinstance(outcome, Finished):
            self.finished.append(task.partition)
            self._profile.add(outcome.seconds)
            self._samples += outcome.samples
            self._bytes += outcome.size
            self._failed += len(outcome.failed)
            for sample_id, reason in outcome.failed:
                logger.warning("sample %s failed: %s", sample_id, reason)
            logger.info("partition %s is complete", task.partition.name)
        self.say(self._state())

    def _state(self) -> str:
        seconds = self.seconds
        speed = f"{self._samples / seconds:.3g} samples/s, {self._bytes / 1e6 / seconds:.3g} MB/s"
        failed = f", {self._failed} samples failed" if self._failed else ""
        return f"{speed} on {self._crew.workers} workers{failed}"


def _keep_measured(
    plan: ExtractionPlan, writer: StoreWriter, where: Surroundings, report: _Report, workers: int
) -> None:
    """The speed of one GPU; that of processes which share a CPU is no other run's, and is named so."""
    machine = where.device
    if machine == "cpu":
        machine = f"cpu, {workers} processes of {where.threads} threads"
    found = [valid_record(writer.path, writer.manifest, partition) for partition in report.finished]
    if records := [record for record in found if record is not None]:
        keep_measured(plan.store, measure(plan, records, report.seconds * workers, machine))


def _job(
    plan: ExtractionPlan,
    writer: StoreWriter,
    where: Surroundings,
    mark: str,
    text: str | None,
    profile: bool,
) -> Job:
    return Job(
        config=plan.config,
        counts={split: len(ids) for split, ids in plan.samples.items()},
        manifest_sha256=hashlib.sha256((writer.path / MANIFEST).read_bytes()).hexdigest(),
        plan_sha256=digest(plan),
        mark=mark,
        where=where,
        profile=profile,
        text=text,
    )


@contextmanager
def _text_folder(plan: ExtractionPlan) -> Generator[str | None]:
    """Where encoded prompts lie while the run lasts, from the store's folder; None where encoders stay."""
    if plan.config.text_pass == "together":
        yield None
        return
    with storage_errors(plan.store):
        folder = staging_folder(plan.store, "text")
    try:
        yield str(folder.relative_to(plan.store))
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a worker that was cut may be writing still


@contextmanager
def _mark(store: Path) -> Generator[str]:
    """A file in the store's staging folder for as long as the run lasts; the next run removes a left one."""
    name = f"{STAGING}/file-{os.getpid()}-{secrets.token_hex(4)}"
    write_durably(store, {name: b""})
    try:
        yield name
    finally:
        (store / name).unlink(missing_ok=True)


@contextmanager
def _worker_logs(client: Client) -> Generator[None]:
    """Have what workers log under our name in this process's log as well."""
    client.forward_logging("mmdiff_cache", logging.INFO)
    try:
        yield
    finally:
        with suppress(Exception):  # the cluster may be gone
            client.unforward_logging("mmdiff_cache")
