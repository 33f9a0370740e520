"""Parts of a sweep on the workers of a dask cluster, one at a time on each."""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from distributed import Client, Event, Future, KilledWorker, wait

from mmdiff_cache.errors import ClusterError
from mmdiff_cache.extraction.cluster import survey
from mmdiff_cache.records import Progress
from mmdiff_cache.sweeps.part import Job, reason, run_part
from mmdiff_cache.training.checkpoint import LAST
from mmdiff_cache.training.run import load_run

logger = logging.getLogger(__name__)

GLANCE_SECONDS = 1.0
"""How often Ctrl-C and lost workers are noticed."""
LONELY_SECONDS = 300.0
"""A cluster that has had no worker for so long is lost."""
LISTEN_SECONDS = 5.0
"""How often a worker asks whether the sweep has been stopped; each time crosses the network."""
ANSWER_SECONDS = 30.0
"""How long a worker may take to hand over what failed."""
DEATHS = 2
"""A part whose worker died so often has failed."""
DIED = "the process that trained it died each time; look at its memory (--memory)"

_one_at_a_time = threading.Lock()
"""Random numbers are the process's: two parts in its threads would take each other's."""


@dataclass(slots=True)
class _UnderWay:
    job: Job
    address: str
    tries: int


def places(client: Client, device: str) -> tuple[str, ...]:
    """Addresses of the workers. Raises ClusterRefused when there is none, or an unfit one."""
    return tuple(survey(client, device))


def on_workers(client: Client, jobs: Sequence[Job], progress: Progress) -> dict[str, str]:
    """Have every part done; the reasons of what failed, by folder.

    A part whose worker dies goes on from its checkpoints on another worker, once. Raises ClusterError when
    the cluster is lost, KeyboardInterrupt on Ctrl-C; what was trained up to the last checkpoints is kept.
    """
    waiting = deque((job, 1) for job in jobs)
    under_way: dict[Future[Any], _UnderWay] = {}
    stop = f"mmdiff-sweep-{secrets.token_hex(4)}-stop"
    failed: dict[str, str] = {}
    last_seen = time.monotonic()
    total = sum(job.steps for job in jobs)
    try:
        while waiting or under_way:
            present = _present(client)
            last_seen = time.monotonic() if present else last_seen
            if time.monotonic() - last_seen > LONELY_SECONDS:
                raise ClusterError(f"the cluster has had no worker for {LONELY_SECONDS:.0f} s; run it again")
            busy = {entry.address for entry in under_way.values()}
            for address in sorted(present - busy):
                if waiting:
                    job, tries = waiting.popleft()
                    future = _submit(client, job, address, stop)
                    under_way[future] = _UnderWay(job=job, address=address, tries=tries)
            for future, entry in _ended(under_way, present):
                del under_way[future]
                _settle(future, entry, waiting, failed)
            left = sum(job.steps for job, _ in waiting) + sum(e.job.steps for e in under_way.values())
            progress(total - left, total, f"{len(under_way)} workers busy, {len(waiting)} readings to come")
    finally:
        if under_way:
            with suppress(Exception):  # the cluster may be what went wrong
                Event(stop, client).set()
                client.cancel(list(under_way), force=True)
    return failed


def _present(client: Client) -> set[str]:
    try:
        return set(cast(dict[str, int], client.nthreads()))
    except (OSError, RuntimeError) as error:
        raise ClusterError(f"the scheduler does not answer any more: {error}; run it again") from error


def _submit(client: Client, job: Job, address: str, stop: str) -> Future[Any]:
    threads = torch.get_num_threads()
    return client.submit(
        _run_here, job, threads, stop, workers=[address], allow_other_workers=False, pure=False, retries=0
    )


def _run_here(job: Job, threads: int, stop: str) -> dict[str, str]:
    """What a worker does, with as many threads as the driver: sums depend on how they are divided."""
    with _one_at_a_time, suppress(_Stopped):
        logging.getLogger("mmdiff_cache").setLevel(logging.INFO)
        torch.set_num_threads(threads)
        return run_part(job, _until(Event(stop)))
    return {}


class _Stopped(BaseException):
    """Nobody waits for the sweep any more. No Exception, for those are a run's own."""


def _until(stop: Event) -> Progress:
    """Tells nobody of the progress, for a call a step would cross the network, but asks whether to go on."""
    asked = time.monotonic()

    def step(done: int, total: int, state: str) -> None:
        nonlocal asked
        if time.monotonic() - asked > LISTEN_SECONDS:
            asked = time.monotonic()
            if stop.is_set():
                raise _Stopped

    return step


def _ended(under_way: dict[Future[Any], _UnderWay], present: set[str]) -> list[tuple[Future[Any], _UnderWay]]:
    """Parts that are done, and those whose worker is no longer there."""
    if under_way:
        with suppress(TimeoutError):
            wait(list(under_way), timeout=GLANCE_SECONDS, return_when="FIRST_COMPLETED")
    else:
        time.sleep(GLANCE_SECONDS)
    return [
        (future, entry)
        for future, entry in under_way.items()
        if future.done() or entry.address not in present
    ]


def _settle(
    future: Future[Any],
    entry: _UnderWay,
    waiting: "deque[tuple[Job, int]]",
    failed: dict[str, str],
) -> None:
    """Take down what a part came to; once more for one whose worker died."""
    if future.status == "finished":
        try:
            failed.update(cast(dict[str, str], future.result(timeout=ANSWER_SECONDS)))
        except (TimeoutError, OSError):  # the worker died with the answer
            failed.update(_all_unfinished(entry.job, "it failed, and its worker died before it said why"))
    elif future.status == "error" and not isinstance(error := future.exception(), KilledWorker):
        failed.update(_all_unfinished(entry.job, reason(cast(Exception, error))))
    elif entry.tries < DEATHS:
        logger.warning("worker %s died; its %d runs go on elsewhere", entry.address, len(entry.job.configs))
        waiting.append((entry.job, entry.tries + 1))
    else:
        failed.update(_all_unfinished(entry.job, DIED))
    future.release()


def _all_unfinished(job: Job, why: str) -> dict[str, str]:
    """The runs of a part that have not finished, with the reason."""
    folders = [Path(str(config.run)) for config in job.configs]
    return {str(f): why for f in folders if not ((f / LAST).exists() and load_run(f).finished)}
