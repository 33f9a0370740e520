"""Data sets that misbehave. dask's workers load this file as a preload, and so do the tests.

A folder of pictures; one whose name holds `poison` kills the process that reads it, one with `slow` takes its
time, one with `hang` never ends, one with `gpu` fails as a broken GPU does.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from mmdiff_cache.datasets.images import ImageFolder
from mmdiff_cache.datasets.listed import DEFAULT_SPLIT
from mmdiff_cache.datasets.registry import DATASETS, DatasetEntry
from mmdiff_cache.records import Sample

SLOW_SECONDS = 0.25
HANG_SECONDS = 600.0


class StrangeFolder(ImageFolder):
    """Pictures that one should not look at."""

    def load(self, split: str, index: int) -> Sample:
        name = self.sample_ids(split)[index]
        if "poison" in name:
            os.kill(os.getpid(), signal.SIGKILL)
        if "slow" in name:
            time.sleep(SLOW_SECONDS)
        if "hang" in name:
            time.sleep(HANG_SECONDS)
        if "gpu" in name:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().load(split, index)


ENTRY = DatasetEntry(
    name="strange",
    summary="pictures that one should not look at",
    open=lambda root, resolution: StrangeFolder(Path(str(root))),
    splits={DEFAULT_SPLIT: None},
    backbone="flux-scenes",
    concepts={},
    needs_root=True,
)


def dask_setup(worker: Any) -> None:
    """Called by dask in each worker."""
    DATASETS["strange"] = ENTRY  # type: ignore[index]
