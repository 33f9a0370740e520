"""The disk refuses: at the n-th write, fsync, rename or mkdir, and for real on a file system too small.

After each refusal one clear line was given, nothing is lost or wrong, and the same command finishes with the
bytes of an undisturbed run.
"""

import builtins
import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmdiff_cache.errors import StorageError, StoreError, StoreIncomplete
from mmdiff_cache.store import files, shard_writer
from mmdiff_cache.store.manifest import MANIFEST
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.verify import verify
from tests.store.synthetic import counted_files, make_features, make_manifest, make_schema, write_store

PLAN = make_manifest(
    make_schema(vocabularies=(), labels=(), layers=("single.4",), partition_size=2),
    splits={"train": ("a", "b", "c")},
)
LINES = {
    errno.ENOSPC: "no space left on the device; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EIO: "input/output error of the device; check the disk",
    errno.EROFS: "the file system is read-only; choose a folder that can be written",
}


class Refusing:
    """Lets `calls` operations through, then refuses one with an errno."""

    def __init__(self, code: int, calls: int) -> None:
        self.code, self.left, self.refused = code, calls, ""

    def __call__(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **keywords: object) -> object:
            if name == "mkdir" and os.path.isdir(arguments[0]):
                return real(*arguments, **keywords)  # nothing would be written
            self.left -= 1
            if self.left == -1:
                self.refused = name
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **keywords)

        return operation

    def open(self, *arguments: Any, **keywords: Any) -> Any:
        file = builtins.open(*arguments, **keywords)  # noqa: SIM115
        if "x" in str(arguments[1:]) or "w" in str(arguments[1:]):
            real, watched = file, self("write", file.write)

            class Watched:
                def __getattr__(self, name: str) -> Any:
                    return watched if name == "write" else getattr(real, name)

                def __enter__(self) -> "Watched":
                    return self

                def __exit__(self, *_: object) -> None:
                    real.close()

            return Watched()
        return file


def run_refused(store: Path, monkeypatch: pytest.MonkeyPatch, code: int, calls: int) -> str:
    """Write the plan on such a disk; the name of the operation that was refused, or '' when none was."""
    refusing = Refusing(code, calls)
    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "mkdir"):
            patch.setattr(os, name, refusing(name, getattr(os, name)))
        for module in (files, shard_writer):
            patch.setattr(module, "open", refusing.open, raising=False)
        try:
            write_store(store, PLAN)
        except StorageError as error:
            line = str(error)
            assert line.startswith("cannot write ")
            assert LINES[code] in line
            assert "\n" not in line
            assert refusing.refused
        else:
            assert not refusing.refused, f"{refusing.refused} was refused and nobody noticed"
    return refusing.refused


def check_half_done(store: Path) -> int:
    """What is said to be done reads right, everything else is an error by name; how many are done."""
    if not (store / MANIFEST).exists():
        return 0
    reader = open_store(store)["train"]
    truth = make_features(PLAN.schema, list(reader.ids)).hidden_states
    for n in range(3):
        if n in reader.finished:
            np.testing.assert_array_equal(reader.hidden_states([n])[0], truth[n, 0])
        else:
            with pytest.raises(StoreIncomplete):
                reader.hidden_states([n])
    assert verify(store).sound
    return len(reader.finished)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("whole") / "s"
    write_store(path, PLAN)
    return counted_files(path)


@pytest.mark.parametrize("code", LINES, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("stride", [23, pytest.param(3, marks=pytest.mark.slow)])
def test_refused_at_any_operation_it_is_finished_by_the_same_command(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, code: int, stride: int
) -> None:
    """Each errno at every so many operations, from another start; the slow ones together meet every one."""
    refused: list[str] = []
    for calls in range(list(LINES).index(code) * (stride // 3) % stride, 10_000, stride):
        store = tmp_path / f"s{calls}"
        name = run_refused(store, monkeypatch, code, calls)
        done = check_half_done(store)
        if not name:
            break
        refused.append(name)
        write_store(store, PLAN)
        assert counted_files(store) == whole
        assert not list((store / "staging").iterdir())
        assert check_half_done(store) == 3 >= done
    assert len(refused) > 3
    assert stride > 3 or set(refused) == {"write", "fsync", "replace", "mkdir"}


def test_refused_again_and_again_nothing_that_was_done_is_lost(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, chance, done = tmp_path / "s", random.Random(0), 0
    for _ in range(12):
        run_refused(store, monkeypatch, chance.choice(list(LINES)), chance.randrange(120))
        now = check_half_done(store)
        assert now >= done
        done = now
    write_store(store, PLAN)
    assert counted_files(store) == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts file systems of so many kilobytes; only root may."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{kilobytes}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Callable[[int], Path], whole: dict[str, bytes]) -> None:
    """From nearly nothing to just too small; then the disk gets larger, and the same command finishes."""
    lines: set[str] = set()
    for kilobytes in range(16, 1000, 24):
        folder = small_disk(kilobytes)
        try:
            write_store(folder / "s", PLAN)
        except StorageError as refusal:
            lines.add(str(refusal))
        else:
            break
        check_half_done(folder / "s")
        subprocess.run(["mount", "-o", "remount,size=4096k", str(folder)], check=True)
        write_store(folder / "s", PLAN)
        assert counted_files(folder / "s") == whole
    assert all("no space left on the device; free some space" in line for line in lines)
    assert len(lines) > 2, "the disk was full at different files"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """As root everything can be read, so a folder takes the file's place."""
    write_store(tmp_path / "s", PLAN)
    for name in ("train.zarr/hidden_states/c.1.0.0.0.0.0.0", "train.zarr/images/c.0.0.0.0"):
        file = tmp_path / "s" / name
        content = file.read_bytes()
        file.unlink()
        file.mkdir()
        reader = open_store(tmp_path / "s")["train"]
        with pytest.raises((StoreError, StorageError), match=name.replace(".", r"\.")):
            reader.hidden_states([1]) if "hidden" in name else reader.images([1])
        assert not verify(tmp_path / "s").sound
        file.rmdir()
        file.write_bytes(content)
    assert counted_files(tmp_path / "s") == whole


def test_the_clock_decides_nothing(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Files from the future and from 1970: a store goes by its records alone."""
    write_store(tmp_path / "s", PLAN)
    (tmp_path / "s/partitions/train-000001.json").unlink()
    for number, file in enumerate(sorted((tmp_path / "s").rglob("*"))):
        moment = (0, 4e9)[number % 2]
        os.utime(file, (moment, moment))
    assert check_half_done(tmp_path / "s") == 2
    write_store(tmp_path / "s", PLAN)
    assert counted_files(tmp_path / "s") == whole
