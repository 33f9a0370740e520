"""The workers of a dask cluster as a crew that takes partitions."""

import logging
import secrets
import statistics
import time
from collections.abc import Collection, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any, cast

import distributed
from distributed import Client, Future, KilledWorker

from mmdiff_cache.errors import ClusterError, ClusterRefused, StorageError
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
)
from mmdiff_cache.extraction.remote import Job, encode_text, extract_partition, prepare
from mmdiff_cache.store.records import Partition

logger = logging.getLogger(__name__)

LONELY_SECONDS = 300.0
"""A cluster that has had no worker for so long is lost."""
ANSWER_SECONDS = 30.0
"""How long a worker may take to hand over what a task returned."""
HUNG_SECONDS = 1800.0
HUNG_TIMES = 8.0
"""A partition under way for so long, and for so many times as long as the median one, has hung."""
RESTART_SECONDS = 60.0
"""How long a process that hangs may take to be replaced."""
LOST = "run the same command again: finished partitions are kept"


class DaskCrew(Crew):
    """Partitions go out as futures; a future is let go as soon as it is read.

    Else dask would compute finished partitions again when the worker that holds their answers dies.
    """

    def __init__(self, client: Client, job: Job) -> None:
        self._client, self._job = client, job
        self._run = secrets.token_hex(4)
        self._under_way: dict[Future[Any], Task] = {}
        self._begun: dict[Future[Any], float] = {}
        self._took: list[float] = []
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
        self._begun[future] = time.monotonic()

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        _wait_for_first(self._under_way, seconds)
        ended: list[tuple[Task, Outcome]] = []
        for future in [future for future in self._under_way if future.done()]:
            with suppress(TimeoutError):  # its worker died with the answer: dask asks another one
                outcome = _outcome(future)
                ended.append((self._under_way.pop(future), outcome))
                begun = self._begun.pop(future)
                if isinstance(outcome, Finished):
                    self._took.append(time.monotonic() - begun)
                future.release()
        return ended or self._end_hung()

    def _end_hung(self) -> list[tuple[Task, Outcome]]:
        """Replace the process of a partition that has hung, as in a GPU's driver: it still says it is alive.

        Nothing has, as long as nothing has finished: nobody knows how long it takes.
        """
        if not self._took:
            return []
        limit = max(HUNG_SECONDS, HUNG_TIMES * statistics.median(self._took))
        late = {f.key for f, begun in self._begun.items() if time.monotonic() - begun > limit}
        if not late:
            return []
        taken = cast(dict[str, Sequence[str]], self._client.processing())
        address = next((worker for worker, keys in taken.items() if late & {*keys}), None)
        if address is None:  # it waits for a worker, and is in nobody's hands
            self._begun |= dict.fromkeys([f for f in self._begun if f.key in late], time.monotonic())
            return []
        logger.error("worker %s hangs: a partition took more than %.0f s; it is replaced", address, limit)
        lost = [future for future in self._under_way if future.key in taken[address]]
        self._client.cancel(lost, force=True)
        self._replace(address)
        for future in lost:
            self._begun.pop(future)
        return [(self._under_way.pop(future), Died()) for future in lost]

    def _replace(self, address: str) -> None:
        try:
            self._client.restart_workers([address], timeout=RESTART_SECONDS, raise_for_error=False)
        except ValueError:  # it has no nanny to kill it and start another
            self._client.retire_workers([address])

    def abandon(self) -> None:
        with suppress(Exception):  # the cluster may be what went wrong
            self._client.cancel(list(self._under_way), force=True)
        self._under_way.clear()
        self._begun.clear()

    def encode_text(self, pending: Sequence[Partition]) -> None:
        """Have one worker encode all prompts. Raises as `prepare` does."""
        key = f"mmdiff-{self._run}-text"
        future = self._client.submit(encode_text, self._job, list(pending), key=key, retries=0)
        while not future.done():
            self.size()  # raises when nobody is left to wait for
            _wait_for_first([future])
        if not _is_ready(future, "that encodes the prompts"):
            raise ClusterRefused(
                "workers died while they encoded the prompts; have they enough memory for the text encoders?"
            )
        future.release()

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
    except (ClusterRefused, StorageError):
        raise
    except CancelledError as error:
        raise ClusterError(f"the scheduler was lost ({error}); {LOST}") from error
    except Exception as error:
        raise ClusterRefused(f"worker {address} cannot load the backbone: {error}") from error
    return True
