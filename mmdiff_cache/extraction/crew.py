"""The workers of a dask cluster as a crew that takes partitions, and a run of stage one on them."""

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import distributed
from distributed import Client, Future, KilledWorker

from mmdiff_cache.errors import ClusterError, ClusterRefused, ExtractionError
from mmdiff_cache.extraction.cluster import PARTITIONS_A_WORKER
from mmdiff_cache.extraction.dispatch import (
    GLANCE_SECONDS,
    HOPELESS,
    Crew,
    Died,
    Finished,
    Outcome,
    Task,
    Troubled,
    dispatch,
)
from mmdiff_cache.extraction.identity import Surroundings
from mmdiff_cache.extraction.plan import ExtractionPlan
from mmdiff_cache.extraction.remote import Job, digest, extract_partition, prepare
from mmdiff_cache.records import Progress
from mmdiff_cache.store.files import STAGING, clear_staging, write_durably
from mmdiff_cache.store.manifest import MANIFEST
from mmdiff_cache.store.records import Partition
from mmdiff_cache.store.writer import StoreWriter

logger = logging.getLogger(__name__)

LONELY_SECONDS = 300.0
"""A cluster that has had no worker for so long is lost."""
ANSWER_SECONDS = 30.0
"""How long a worker may take to hand over what a task returned."""
NAMED = 5
"""How many failed partitions are named; the log names all."""
LOST = "run the same command again: finished partitions are kept"


class DaskCrew(Crew):
    """Partitions go out as futures; a future is let go as soon as it is read.

    Else dask would compute finished partitions again when the worker that holds their answers dies.
    """

    def __init__(self, client: Client, job: Job) -> None:
        self._client, self._job = client, job
        self._run = secrets.token_hex(4)
        self._under_way: dict[Future[Any], Task] = {}
        self._last_seen = time.monotonic()
        self._present: set[str] = set()
        self.size()

    def size(self) -> int:
        try:
            threads = cast(dict[str, int], self._client.nthreads())
        except (OSError, RuntimeError) as error:
            raise ClusterError(f"the scheduler does not answer any more: {error}; {LOST}") from error
        if threads:
            self._last_seen = time.monotonic()
        elif time.monotonic() - self._last_seen > LONELY_SECONDS:
            raise ClusterError(f"the cluster has had no worker for {LONELY_SECONDS:.0f} s; {LOST}")
        self._present = set(threads)
        return sum(min(count, PARTITIONS_A_WORKER) for count in threads.values())

    @property
    def workers(self) -> int:
        """How many there were when last looked at."""
        return len(self._present)

    def submit(self, task: Task) -> None:
        key = f"mmdiff-{self._run}-{task.partition.name}-{task.attempt}"
        future = self._client.submit(
            extract_partition, self._job, task.partition, task.again, key=key, pure=False, retries=0
        )
        self._under_way[future] = task

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        _wait_for_first(self._under_way, seconds)
        ended: list[tuple[Task, Outcome]] = []
        for future in [future for future in self._under_way if future.done()]:
            with suppress(TimeoutError):  # its worker died with the answer: dask asks another one
                outcome = _outcome(future)
                ended.append((self._under_way.pop(future), outcome))
                future.release()
        return ended

    def abandon(self) -> None:
        with suppress(Exception):  # the cluster may be what went wrong
            self._client.cancel(list(self._under_way), force=True)
        self._under_way.clear()

    def prepare(self) -> None:
        """Have every worker make its plan and load its model now, to hear of a trouble before the work.

        Raises ClusterRefused when one cannot, or when workers die of it again and again.
        """
        futures: dict[str, Future[Any]] = {}
        ready: set[str] = set()
        deaths = 0
        while not ready or not self._addresses() <= ready:
            present = self._addresses()
            for address in present - futures.keys() - ready:
                key = f"mmdiff-{self._run}-at-{address}"
                futures[address] = self._client.submit(prepare, self._job, workers=[address], key=key)
            for address in [address for address in futures if address not in present]:
                futures.pop(address).cancel()
                deaths += 1
                logger.warning(
                    "worker %s died while it got ready; one that takes its place is asked", address
                )
            if deaths >= HOPELESS:
                raise ClusterRefused(
                    f"{deaths} workers died while they loaded the backbone; have they enough memory?"
                )
            _wait_for_first(futures.values())
            for address in [address for address in futures if futures[address].done()]:
                if _is_ready(futures[address], address):
                    futures.pop(address).release()
                    ready.add(address)

    def _addresses(self) -> set[str]:
        self.size()
        return self._present


def _outcome(future: Future[Any]) -> Outcome:
    try:
        return cast(Outcome, future.result(timeout=ANSWER_SECONDS))
    except KilledWorker:
        return Died()
    except CancelledError as error:
        raise ClusterError(f"the scheduler was lost ({error}); {LOST}") from error
    except TimeoutError:
        raise
    except Exception as error:  # of dask itself: a task returns what goes wrong in it
        return Troubled(reason=f"{type(error).__name__}: {error}", error=None, may_pass=True)


def _wait_for_first(futures: Collection[Future[Any]], seconds: float = GLANCE_SECONDS) -> None:
    """Until one of them is done, or some seconds have passed."""
    if not futures:
        return time.sleep(seconds)
    with suppress(TimeoutError, CancelledError):
        distributed.wait(list(futures), timeout=seconds, return_when="FIRST_COMPLETED")
    return None


def _is_ready(future: Future[Any], address: str) -> bool:
    """Whether a worker got ready; False where it died of it, which its absence will tell soon."""
    try:
        future.result(timeout=ANSWER_SECONDS)
    except (KilledWorker, TimeoutError):
        return False
    except ClusterRefused:
        raise
    except CancelledError as error:
        raise ClusterError(f"the scheduler was lost ({error}); {LOST}") from error
    except Exception as error:
        raise ClusterRefused(f"worker {address} cannot load the backbone: {error}") from error
    return True


def run_on_cluster(
    client: Client,
    where: Surroundings,
    plan: ExtractionPlan,
    writer: StoreWriter,
    pending: Sequence[Partition],
    again: Sequence[Partition],
    progress: Progress,
) -> None:
    """Extract the pending partitions on the workers, those of `again` although they have records.

    Raises ExtractionError when some failed again and again, after all others are finished; KeyboardInterrupt
    after Ctrl-C, when what was under way has ended; StorageError and other errors that end a run.
    """
    with _mark(writer.path) as mark, _worker_logs(client):
        crew = DaskCrew(client, _job(plan, writer, where, mark))
        report = _Report(plan, pending, crew, progress)
        report.say(f"loading {plan.backbone.name} on {crew.workers} workers")
        crew.prepare()
        report.begin()
        tasks = [Task(partition=partition, again=partition in again) for partition in pending]
        failed = dispatch(tasks, crew, report.settled, report.say)
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
        self, plan: ExtractionPlan, pending: Sequence[Partition], crew: DaskCrew, progress: Progress
    ) -> None:
        self._plan, self._crew, self._progress = plan, crew, progress
        self._done = plan.total - sum(partition.size for partition in pending)
        self._samples, self._bytes, self._failed, self._begun = 0, 0, 0, time.monotonic()

    def say(self, state: str) -> None:
        self._progress(self._done + self._samples, self._plan.total, state)

    def begin(self) -> None:
        """From now on time counts for the speed."""
        self._begun = time.monotonic()

    def settled(self, task: Task, outcome: Outcome) -> None:
        """Log how a partition ended; what failed is logged where it is decided."""
        if isinstance(outcome, Finished):
            self._samples += outcome.samples
            self._bytes += outcome.size
            self._failed += len(outcome.failed)
            for sample_id, reason in outcome.failed:
                logger.warning("sample %s failed: %s", sample_id, reason)
            logger.info("partition %s is complete", task.partition.name)
        self.say(self._state())

    def _state(self) -> str:
        seconds = max(time.monotonic() - self._begun, 1e-3)
        speed = f"{self._samples / seconds:.3g} samples/s, {self._bytes / 1e6 / seconds:.3g} MB/s"
        failed = f", {self._failed} samples failed" if self._failed else ""
        return f"{speed} on {self._crew.workers} workers{failed}"


def _job(plan: ExtractionPlan, writer: StoreWriter, where: Surroundings, mark: str) -> Job:
    return Job(
        config=plan.config,
        counts={split: len(ids) for split, ids in plan.samples.items()},
        manifest_sha256=hashlib.sha256((writer.path / MANIFEST).read_bytes()).hexdigest(),
        plan_sha256=digest(plan),
        mark=mark,
        where=where,
    )


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
