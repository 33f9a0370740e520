"""What a result may depend on besides the configuration: versions, device, threads, the code itself."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmdiff_cache.training.checkpoint import write_json

PACKAGES = ("mmdiff-cache", "torch", "numpy", "safetensors", "zarr", "numcodecs")
PACKAGE = Path(__file__).parents[1]
GIT_SECONDS = 20


def environment(device: str) -> dict[str, Any]:
    """As JSON; `source` is there where the package runs from a checkout."""
    on_gpu = device.startswith("cuda")
    source = source_tree(PACKAGE)
    return {
        "versions": {name: version(name) for name in PACKAGES},
        **({} if source is None else {"source": source}),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
    }


def note_environment(file: Path, device: str, step: int) -> None:
    """Where a training goes on in another environment than before, add that one to its file, with the step.

    Raises StorageError when the file system refuses.
    """
    try:
        noted = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError):  # it was taken away or cut: what is known now is better than nothing
        noted = {}
    later: list[dict[str, Any]] = noted.get("later", [])
    before = later[-1] if later else noted
    now = environment(device)
    if any(before.get(name) != value for name, value in now.items()):
        write_json(file, {**noted, "later": [*later, {"from_step": step, **now}]})


def source_tree(package: Path) -> dict[str, Any] | None:
    """The commit that a package is checked out at, and whether its files differ from it.

    None where git is missing, or does not track the package: an installed one inside of another project.
    """
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(package, "rev-parse", "HEAD")
        changes = _git(package, "--no-optional-locks", "status", "--porcelain", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *words: str) -> str:
    # a hook of another repository would point git at that one
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(folder), *words],
        env=variables,
        capture_output=True,
        text=True,
        timeout=GIT_SECONDS,
        check=True,
    )
    return done.stdout.strip()
