"""Clusters of dask: one of this machine's own, or one that runs already; and what their workers are.

Scheduler, workers and dashboard of an own cluster listen on the loopback interface alone: whoever reaches a
dask scheduler can run any code.
"""

import json
import logging
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import dask.config
from distributed import Client, Nanny, Scheduler, SpecCluster

from mmdiff_cache.errors import ClusterError, ClusterRefused
from mmdiff_cache.extraction import preload
from mmdiff_cache.extraction.identity import Surroundings, surroundings
from mmdiff_cache.extraction.remote import Place, check_surroundings, place

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PARTITIONS_A_WORKER = 2
"""While one partition is committed, the next one computes."""
START_SECONDS = 300.0
"""How long workers may take to appear."""
STARTS = 3
"""How often a cluster is begun whose processes die while they start."""
SURVEYS = 3
"""How often workers are asked, when some die or leave while they are."""
SETTINGS: Mapping[str, Any] = {
    "distributed.scheduler.allowed-failures": 1,  # each try loads the model anew
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.scheduler.worker-ttl": "30m",  # a model that loads may hold the interpreter for minutes
    "distributed.scheduler.work-stealing": False,
    # else a worker that is away for 15 s, or a second time 15 s later, is given up: they take long to start
    "distributed.deploy.lost-worker-timeout": "30 days",
    # dask would give its workers one thread, and they have to round as this process does (remote.Job.where);
    # it would also make them give memory back at once, and a training took a third longer for asking again
    "distributed.nanny.pre-spawn-environ.OMP_NUM_THREADS": None,
    "distributed.nanny.pre-spawn-environ.MKL_NUM_THREADS": None,
    "distributed.nanny.pre-spawn-environ.OPENBLAS_NUM_THREADS": None,
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
}


@contextmanager
def own_cluster(workers: int, gpus: Sequence[str]) -> Generator[Client]:
    """Start workers on this machine, one for each of the first GPUs, or on the CPU where there are none.

    Raises ClusterRefused when they do not start.
    """
    with tempfile.TemporaryDirectory(prefix="mmdiff-cache-") as scratch:
        spec = {number: _worker(gpus[number] if gpus else None) for number in range(workers)}
        scheduler = {"host": LOOPBACK, "dashboard_address": f"{LOOPBACK}:0"}
        with (
            dask.config.set({**SETTINGS, "temporary-directory": scratch}),
            _start(spec, {"cls": Scheduler, "options": scheduler}) as cluster,
            Client(cluster) as client,
        ):
            _wait_for(client, workers)
            yield client


def _start(workers: dict[int, dict[str, Any]], scheduler: dict[str, Any]) -> SpecCluster:
    """Processes that die before they are there are not started again by dask, which gives up the cluster."""
    last: RuntimeError | None = None
    for attempt in range(1, STARTS + 1):
        try:
            return SpecCluster(workers, scheduler)
        except RuntimeError as error:
            logger.warning("a worker died while it started (attempt %d of %d)", attempt, STARTS)
            last = error
    raise ClusterRefused(
        f"in each of {STARTS} attempts a worker process died while it started ({last}); has this machine "
        "memory for so many processes? Start fewer with --workers"
    ) from last


def _worker(gpu: str | None) -> dict[str, Any]:
    """A process that is started again when it dies. Its memory is not limited: a model may fill it."""
    environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    options = {
        "nthreads": PARTITIONS_A_WORKER,
        "memory_limit": 0,
        "host": LOOPBACK,
        "env": environment,
        "silence_logs": logging.WARNING,
        "preload": [*dask.config.get("distributed.worker.preload"), preload.__name__],
    }
    return {"cls": Nanny, "options": options}


@contextmanager
def joined_cluster(scheduler: str) -> Generator[Client]:
    """Join a cluster by its address or its scheduler file; it goes on when we leave.

    Certificates for tls:// are those of dask's own configuration. Raises ClusterRefused when nothing answers.
    """
    address = scheduler if "://" in scheduler else _read_address(Path(scheduler))
    try:
        client = Client(address)
    except (OSError, ValueError, TypeError) as error:
        raise ClusterRefused(f"no scheduler answers at {address}: {error}; is it running?") from error
    with client:
        yield client


def _read_address(file: Path) -> str:
    """The address in a scheduler file, as `dask scheduler --scheduler-file` writes it."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ClusterRefused(
            f"{str(file)!r} is neither an address (tcp://HOST:PORT, tls://HOST:PORT) nor a scheduler file: "
            f"{error}"
        ) from error


def survey(client: Client, device: str) -> dict[str, Place]:
    """What every worker is, by its address.

    Raises ClusterRefused when there is none, one has no mmdiff-cache or other versions than this process, or
    two share a GPU.
    """
    if client.asynchronous:
        raise ClusterRefused("the client is asynchronous; give one made with asynchronous=False")
    answers = _ask(client, device)
    used: dict[tuple[str, str], str] = {}
    for address, answer in answers.items():
        if not isinstance(answer, Place):
            raise ClusterRefused(f"worker {address} cannot run mmdiff-cache: {answer!r}; install it there")
        check_surroundings(_expected(answer), answer.surroundings, f"worker {address}")
        if answer.device_id is not None:
            other = used.setdefault((answer.host, answer.device_id), address)
            if other != address:
                raise ClusterRefused(
                    f"workers {other} and {address} share a GPU of {answer.host}; start one worker a GPU, "
                    "each with its own CUDA_VISIBLE_DEVICES"
                )
    return answers


def _ask(client: Client, device: str) -> dict[str, Any]:
    """The answer of every worker, or what it failed with; one that dies meanwhile is not counted."""
    answers: dict[str, Any] = {}
    for _ in range(SURVEYS):
        _wait_for(client, 1)
        answers = cast(dict[str, Any], client.run(place, device, on_error="return"))
        if not any(isinstance(answer, OSError) for answer in answers.values()):
            break
    return answers


def _expected(found: Place) -> Surroundings:
    """This process's, but for what only a worker can know: it may have GPUs where we have none."""
    return replace(surroundings("cpu"), device=found.surroundings.device)


def in_common(places: Mapping[str, Place]) -> Surroundings:
    """What the store's provenance says of the workers. Raises ClusterRefused for GPUs beside CPUs."""
    first, *others = (found.surroundings for found in places.values())
    for address, found in zip(list(places)[1:], others, strict=True):
        check_surroundings(first, found, f"worker {address}")
    devices = sorted({found.device for found in (first, *others)})
    threads = surroundings("cpu").threads if first.device == "cpu" else None
    return replace(first, device=", ".join(devices), threads=threads)


def _wait_for(client: Client, workers: int) -> None:
    try:
        client.wait_for_workers(workers, timeout=START_SECONDS)
    except TimeoutError as error:
        raise ClusterRefused(
            f"{workers} workers were expected, and too few have come within {START_SECONDS:.0f} s; start "
            "them first, or look at their logs"
        ) from error
    except OSError as error:
        raise ClusterError(f"the scheduler does not answer: {error}") from error
