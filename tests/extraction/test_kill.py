"""A run killed at any moment and started again ends with the very bytes of a run that nobody disturbed.

Twenty moments: nine with a name, and eleven drawn from all others. Each test asserts where the kill landed.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.store.reader import open_store

RANDOM_MOMENTS = 11
SEED = 20
SAMPLES, PARTITION = 6, 2
LAST = SAMPLES // PARTITION - 1


@dataclass(frozen=True)
class Runner:
    """Talks to the process that runs and kills extractions."""

    process: subprocess.Popen[str]
    config: ExtractConfig

    def run(self, store: Path, kill_at: int | None = None, *, tear: bool = False) -> tuple[int, list[str]]:
        """Extract into a store; returns the wait status and the durable steps that were begun."""
        events = store.with_suffix(".events")
        config = {**self.config.to_json(), "store": str(store)}
        job = {"config": config, "events": str(events), "kill_at": kill_at, "tear": tear}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), events.read_text().splitlines()


@dataclass(frozen=True)
class Reference:
    """A run that nobody disturbed: its steps, and the hashes of its files."""

    steps: list[str]
    tree: dict[str, str]


@pytest.fixture(scope="module")
def runner(tiny_flux_folder: Path) -> Iterator[Runner]:
    script = Path(__file__).with_name("killable.py")
    config = ExtractConfig(
        backbone=str(tiny_flux_folder),
        splits=("val",),
        limit=SAMPLES,
        partition_size=PARTITION,
        resolution=64,
        layers=("double.1", "single.2"),
        timesteps=(0.5, 0.1),
        concepts={"segmentation": ("object", "background")},
    )
    command = [sys.executable, str(script), str(tiny_flux_folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Runner(process, config)
        assert process.stdin
        process.stdin.close()
        assert process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def reference(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    status, steps = runner.run(store)
    assert status == 0
    return Reference(steps, tree(store))


def tree(store: Path) -> dict[str, str]:
    """SHA-256 of every file that is part of a store: manifest, groups, records."""
    parts = [store / "manifest.json", *store.rglob("*.zarr/**/*"), *(store / "partitions").iterdir()]
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in parts
        if path.is_file()
    }


def record(partition: int) -> str:
    return f"replace partitions/val-{partition:06d}.json"


def first(steps: list[str], wanted: Callable[[str], bool], start: int = 0) -> int:
    return next(number for number in range(start, len(steps)) if wanted(steps[number]))


def staged(array: str) -> Callable[[str], bool]:
    return lambda step: step.startswith("fsync staging/val-000000/") and f"/{array}/" in step


def shards_begin(steps: list[str]) -> int:
    """The first move of a shard into the store; coordinates went there before the manifest."""
    return first(
        steps, lambda step: step.startswith("replace val.zarr/"), steps.index("replace manifest.json")
    )


NAMED: dict[str, tuple[Callable[[list[str]], int], bool, int | None]] = {
    # name: (which step, whether its file is torn, records that must be there; None = no manifest yet)
    "at the very first step": (lambda steps: 0, False, None),
    "before the manifest": (lambda steps: steps.index("replace manifest.json"), False, None),
    "before the first record": (lambda steps: steps.index(record(0)), False, 0),
    "inside a shard": (lambda steps: first(steps, staged("hidden_states")), True, 0),
    "inside a small shard": (lambda steps: first(steps, staged("images")), True, 0),
    "between two shards": (lambda steps: shards_begin(steps) + 3, False, 0),
    "between shard and record": (lambda steps: steps.index(record(1)), False, 1),
    "right after a record": (lambda steps: steps.index(record(1)) + 1, False, 2),
    "after the last record": (lambda steps: steps.index(record(LAST)) + 1, False, LAST + 1),
}


QUICK = ("before the first record", "inside a shard", "between shard and record", "after the last record")
"""The moments that every test run takes; the others are marked slow."""


def kill_and_go_on(
    runner: Runner, reference: Reference, store: Path, moment: int, *, tear: bool = False
) -> int | None:
    """Kill a run, look at what it left, run again, compare. Returns the number of records it had left."""
    status, steps = runner.run(store, moment, tear=tear)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert steps == reference.steps[: moment + 1]
    left = trusted_records(store)
    status, _ = runner.run(store)
    assert status == 0
    assert tree(store) == reference.tree
    assert open_store(store).samples_done == SAMPLES
    assert not list((store / "staging").iterdir())
    return left


def trusted_records(store: Path) -> int | None:
    """How many records there are, each of them true of its files. None before there is a manifest."""
    if not (store / "manifest.json").exists():
        return None
    records = sorted((store / "partitions").glob("*.json"))
    for path in records:
        for file in json.loads(path.read_text())["files"]:
            assert hashlib.sha256((store / file["path"]).read_bytes()).hexdigest() == file["sha256"]
    assert open_store(store).samples_done == len(records) * PARTITION
    return len(records)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMED]
)
def test_killed_at_a_named_moment(name: str, runner: Runner, reference: Reference, tmp_path: Path) -> None:
    choose, tear, records = NAMED[name]
    moment = choose(reference.steps)
    assert kill_and_go_on(runner, reference, tmp_path / "store", moment, tear=tear) == records


@pytest.mark.slow
@pytest.mark.parametrize("number", range(RANDOM_MOMENTS))
def test_killed_at_a_random_moment(number: int, runner: Runner, reference: Reference, tmp_path: Path) -> None:
    named = {choose(reference.steps) for choose, _, _ in NAMED.values()}
    others = [moment for moment in range(len(reference.steps)) if moment not in named]
    moment = random.Random(SEED).sample(others, RANDOM_MOMENTS)[number]
    kill_and_go_on(runner, reference, tmp_path / "store", moment)


@pytest.mark.slow
def test_killed_again_and_again(runner: Runner, reference: Reference, tmp_path: Path) -> None:
    """Every run gets a little further than the one before, and the last one ends with the same bytes."""
    store, status, runs = tmp_path / "store", 1, 0
    while status != 0:
        status, _ = runner.run(store, 60 + 60 * runs)
        runs += 1
    assert runs > 2
    assert tree(store) == reference.tree


def test_a_run_in_one_process_imports_no_dask(runner: Runner, tmp_path: Path) -> None:
    status, _ = runner.run(tmp_path / "store")
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_run_over_a_finished_store_changes_nothing(
    runner: Runner, reference: Reference, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    runner.run(store)
    times = {path: path.stat().st_mtime_ns for path in store.rglob("*.zarr/**/*")}
    status, steps = runner.run(store)
    assert status == 0
    assert steps == []
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.zarr/**/*")} == times
