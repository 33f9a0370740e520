"""A training that is killed anywhere, again and again, ends with the files of one that nothing disturbed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmdiff_cache.config import EmaConfig
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.run import load_run, train
from tests.learnable import write_store
from tests.training.conftest import TINY, small_config
from tests.training.test_run import Stop, assert_same, stop_at
from tests.training.test_stopping import HARD

ROOT = Path(__file__).parents[2]
EVERYTHING: dict[str, Any] = {
    "accumulate": 3,
    "clip": 0.05,
    "precision": "bfloat16",
    "aggregator": replace(TINY, dropout=0.3),
    "ema": EmaConfig(beta=0.9),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "few", train=8, test=2)


@pytest.mark.parametrize("changes", [{}, {"holdout": 0.0}], ids=["with a holdout", "without"])
def test_parts_clipping_and_bfloat16_go_on_exactly(
    store: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = train(small_config(store, tmp_path / "whole", **EVERYTHING, **changes))
    config = small_config(store, tmp_path / "interrupted", **EVERYTHING, **changes)
    for step in (3, 7, 8):
        with pytest.raises(Stop):
            train(config, progress=stop_at(step))
    assert_same(whole, train(config))
    other = train(small_config(store, tmp_path / "other", **{**EVERYTHING, "clip": None}, **changes))
    assert read_metrics(other.path)[-1] != read_metrics(whole.path)[-1], "clipping does something here"


class Victim:
    """The process of killable.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.killable"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def train(self, config: dict[str, Any], seconds: float | None) -> tuple[int, float]:
        """Train in a fork, killed after so many seconds if it lives that long: its status and its time."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(config) + "\n")
        child, begun = int(self.process.stdout.readline()), time.monotonic()
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(self.process.stdout.readline()), time.monotonic() - begun


@pytest.fixture
def victim() -> Iterator[Victim]:
    started = Victim()
    yield started
    started.process.communicate()


def files(run: Path) -> dict[str, bytes]:
    """What must be the same; times and speeds stand elsewhere."""
    names = ["last.safetensors", "best.safetensors", "config.json", "store.json"]
    pictures = [f"pictures/{path.name}" for path in (run / "pictures").iterdir()]
    return {name: (run / name).read_bytes() for name in [*names, *pictures]}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, EVERYTHING, HARD], ids=["plain", "parts, clip, bf16", "early stop"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    store: Path, tmp_path: Path, victim: Victim, changes: dict[str, Any]
) -> None:
    chance = random.Random(0)
    config = small_config(store, tmp_path / "run", **{"steps": 60, "checks": 20, **changes}).to_json()
    status, seconds = victim.train(config, None)
    assert status == 0
    whole = files(tmp_path / "run")
    metrics = [line.get("held_out") for line in read_metrics(tmp_path / "run")]
    stopped_early = load_run(tmp_path / "run").stopped_early
    assert stopped_early == (changes is HARD)
    shutil.move(tmp_path / "run", tmp_path / "whole")  # the path is part of a checkpoint
    kills, status = 0, 1
    while status != 0 and kills < 60:
        status, _ = victim.train(config, chance.uniform(0, 0.6 * seconds))
        kills += status == signal.SIGKILL
        assert status in (0, signal.SIGKILL)
    if status != 0:
        status, _ = victim.train(config, None)
    assert status == 0
    assert kills > 2
    assert files(tmp_path / "run") == whole
    assert not list((tmp_path / "run").glob(".*.partial"))
    assert [line.get("held_out") for line in read_metrics(tmp_path / "run")] == metrics
