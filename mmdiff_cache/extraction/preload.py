"""What each worker of an own cluster loads first: Ctrl-C in a terminal is meant for the driver alone."""

import signal
from typing import Any


def dask_setup(worker: Any) -> None:
    """Called by dask in the worker's process.

    A terminal sends SIGINT to the whole group of processes, and dask's workers would end of it at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
