"""Where a run takes place: in this process, on an own cluster of this machine, or on one that is joined.

dask is imported only where there is a cluster.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.errors import ConfigError

if TYPE_CHECKING:
    from distributed import Client
else:
    Client = Any


@contextmanager
def open_cluster(
    config: ExtractConfig, workers: int | None = None, scheduler: str | None = None
) -> Generator[Client | None]:
    """A client of the cluster that a run takes place on; None where it is this process.

    `workers` processes are started on this machine, and stopped in the end: one a GPU, or so many on the CPU;
    0 is none, whatever there is. By default there is one for each visible GPU if there are several.
    `scheduler` is the address (tcp://..., tls://...) or the scheduler file of a running cluster, which is
    left running.

    Raises ConfigError for more workers than GPUs, ClusterRefused when nothing answers or no worker starts.
    """
    if scheduler is not None:
        if workers is not None:
            raise ConfigError("--workers starts a cluster and --scheduler joins one; choose one of them")
        from mmdiff_cache.extraction.cluster import joined_cluster

        with joined_cluster(scheduler) as client:
            yield client
        return
    workers = worker_count(config, workers)
    if workers == 0:
        yield None
        return
    from mmdiff_cache.extraction.cluster import own_cluster

    with own_cluster(workers, visible_gpus(config.device)) as client:
        yield client


def worker_count(config: ExtractConfig, workers: int | None) -> int:
    """How many processes to start where `workers` are asked: None is one for each of several GPUs.

    0 is no process but this one. Raises ConfigError for more than there are GPUs.
    """
    gpus = visible_gpus(config.device)
    if workers is None:
        return len(gpus) if len(gpus) > 1 else 0
    if gpus and workers > len(gpus):
        raise ConfigError(
            f"{workers} workers were asked, but {len(gpus)} GPUs are visible, and a worker needs one of its "
            "own; give fewer --workers, or --set device=cpu"
        )
    return workers


def visible_gpus(device: str) -> tuple[str, ...]:
    """What to put into CUDA_VISIBLE_DEVICES to see one GPU each; none for a run on the CPU."""
    if device == "cpu":
        return ()
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = tuple(named.split(","))[:count] if named else tuple(map(str, range(count)))
    if device.startswith("cuda:"):
        number = int(device.removeprefix("cuda:") or 0)
        return gpus[number : number + 1]
    return gpus
