"""Runs a small extraction that is killed at chosen file operations, then runs it again: test_kill's script.

A process of its own, forked before zarr has started a thread. Arguments: a folder, then the numbers of the
operations (os.replace, os.fsync, os.unlink, os.mkdir, the index behind a shard's chunks) instead of which a
run dies; without numbers it runs to its end. One JSON line a run: where it died, and how the second ended.
"""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.errors import StoreIncomplete
from mmdiff_cache.store import shard_writer
from mmdiff_cache.store.manifest import MANIFEST
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.shards import encode_index
from tests.store.synthetic import make_features, make_manifest, make_schema, write_store

MANIFEST_OF_RUN = make_manifest(
    make_schema(vocabularies=(), labels=(), layers=("single.4",), partition_size=2),
    splits={"train": ("a", "b", "c")},
)


def record_operations(log: Path, die_at: int | None) -> None:
    """Note every operation that changes files, and end the process instead of doing number `die_at`."""
    count = 0

    def note(line: str) -> None:
        nonlocal count
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        if count == die_at:
            os._exit(9)
        count += 1

    def watch(name: str) -> None:
        real = getattr(os, name)

        def watched(*arguments: object, **keywords: object) -> object:
            target = arguments[1] if name == "replace" else arguments[0]
            if isinstance(target, int):
                target = os.readlink(f"/proc/self/fd/{target}")
            shown = re.sub(r"-\d+-[0-9a-f]{8}|[0-9a-f]{32}", "-*", str(target)).replace(str(log.parent), "")
            note(f"{name} {re.sub('/[a-z]*[0-9]*/', '/', shown, count=1)}")
            # a killed process loses nothing that it wrote, so the slow part of fsync would prove nothing here
            return None if name == "fsync" else real(*arguments, **keywords)

        setattr(os, name, watched)

    def index(places: NDArray[np.uint64]) -> bytes:
        note("index of a shard")
        return encode_index(places)

    for name in ("replace", "fsync", "unlink", "mkdir"):
        watch(name)
    shard_writer.encode_index = index


def in_child(log: Path, store: Path, die_at: int | None) -> int:
    """Run the extraction in a forked process; its exit status."""
    child = os.fork()
    if child == 0:
        record_operations(log, die_at)
        write_store(store, MANIFEST_OF_RUN)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_half_done(store: Path) -> None:
    """In a forked process: what is said to be done reads right, and everything else is an error by name."""
    if os.fork() == 0:
        code = 1
        try:
            if (store / MANIFEST).exists():
                opened = open_store(store)
                for split in opened.splits:
                    reader = opened[split]
                    truth = make_features(MANIFEST_OF_RUN.schema, list(reader.ids)).hidden_states
                    for n in range(len(reader)):
                        if reader.state(n) == "done":
                            np.testing.assert_array_equal(
                                reader.hidden_states([n], variant=1)[0], truth[n, 1]
                            )
                            continue
                        try:
                            reader.hidden_states([n])
                        except StoreIncomplete:
                            continue
                        raise AssertionError(
                            f"sample {n} of {split} was read, although it was never finished"
                        )
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0


def main() -> None:
    folder, points = Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]
    for point in points or [None]:
        home = folder / ("whole" if point is None else f"run{point}")
        home.mkdir()
        status = in_child(home / "log", home / "store", point)
        operations = (home / "log").read_text().splitlines()
        if point is not None:
            check_half_done(home / "store")
            again = in_child(home / "log2", home / "store", None)
        else:
            again = status
        line = {"point": point, "status": status, "again": again, "operations": operations}
        sys.stdout.write(json.dumps(line) + "\n")


main()
