"""A run that is killed anywhere and run again leaves the same bytes; nothing wrong is ever read."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.store.synthetic import counted_files

ROOT = Path(__file__).parents[2]
MOMENTS = {
    "before the store's folder exists": "mkdir /store",
    "inside the metadata": "replace /train.zarr/hidden_states/zarr.json",
    "metadata written, manifest not": "replace /manifest.json",
    "manifest renamed, not yet durable": "fsync /store",
    "inside a shard": "index of a shard",
    "shard staged, not yet durable": "fsync /staging/train-000000-*/train.zarr/hidden_states/c.1.1.0.0.0.0.0",
    "before the first shard is in place": "replace /train.zarr/audit/c.0.0.0.0.0",
    "between two shards": "replace /train.zarr/hidden_states/c.1.0.0.0.0.0.0",
    "all shards in place, no record": "fsync /staging/file-*",
    "between shard and record": "replace /partitions/train-000000.json",
    "record renamed, not yet durable": "fsync /partitions",
    "inside the last partition": "replace /train.zarr/images/c.1.0.0.0",
    "before the last record": "replace /partitions/train-000001.json",
    "after the last record": "unlink zarr.json",
}


def runs(folder: Path, *points: int) -> list[dict[str, Any]]:
    words = [sys.executable, "-m", "tests.store.killed_runs", str(folder), *map(str, points)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def last(operations: list[str], wanted: str) -> int:
    return len(operations) - 1 - operations[::-1].index(wanted)


def check(folder: Path, run: dict[str, Any], operations: list[str]) -> None:
    """The run died where it should, and the second run left the bytes of an undisturbed one."""
    assert run["status"] == 9
    assert run["again"] == 0
    assert run["operations"] == operations[: run["point"] + 1], "the kill landed elsewhere"
    store = folder / f"run{run['point']}" / "store"
    assert counted_files(store) == counted_files(folder / "whole" / "store")
    assert not list((store / "staging").iterdir())


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    operations: list[str] = runs(tmp_path)[0]["operations"]
    points = {moment: operations.index(wanted) for moment, wanted in MOMENTS.items()}
    points["manifest renamed, not yet durable"] = last(operations, "fsync /store")
    points["all shards in place, no record"] = operations.index("replace /partitions/train-000000.json") - 1
    points["after the last record"] = last(operations, "replace /partitions/train-000001.json") + 2
    check_order(operations)
    for run in runs(tmp_path, *points.values()):
        check(tmp_path, run, operations)


def check_order(operations: list[str]) -> None:
    """What a power cut asks for: content durable before its name, names before the record that needs them."""
    record = operations.index("replace /partitions/train-000000.json")
    manifest = operations.index("replace /manifest.json")
    for number, line in enumerate(operations):
        action, path = line.split(" ", 1)
        if action != "replace" or path.startswith("/staging"):
            continue
        staged = f"/staging/train-000000-*{path}"
        if f"fsync {staged}" in operations:
            assert operations.index(f"fsync {staged}") < number
        elif "/c." not in path:
            assert operations[number - 1] == "fsync /staging/file-*"
        folder = f"fsync {path.rsplit('/', 1)[0] or '/store'}"
        reliant = manifest if number < manifest else record if number < record else len(operations)
        assert number == manifest or folder in operations[number:reliant], f"{path} is not durable in time"
    assert operations[record + 1] == "fsync /partitions"


@pytest.mark.slow
def test_killed_at_fifty_random_moments(tmp_path: Path) -> None:
    operations: list[str] = runs(tmp_path)[0]["operations"]
    for run in runs(tmp_path, *random.Random(0).sample(range(len(operations)), 50)):
        check(tmp_path, run, operations)
