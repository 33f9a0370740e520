"""The disk refuses while a training writes: one clear line, the last good checkpoint stays, the same command
goes on to the weights of an undisturbed training. What only shows the training does not stop it.
"""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdiff_cache.cli.app import run as command
from mmdiff_cache.errors import StorageError, StorageRefused
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.folder import append_metrics, read_metrics
from mmdiff_cache.training.run import Run, load_run, train
from tests.training.conftest import small_config
from tests.training.test_run import assert_same, tensors

CHANGES = {"steps": 8, "checks": 4}


@pytest.fixture(scope="module")
def whole(learnable_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training that nothing disturbed."""
    return train(small_config(learnable_store, tmp_path_factory.mktemp("runs") / "whole", **CHANGES))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts file systems of so many kilobytes; only root may."""
    mounted: list[Path] = []

    def mount(kilobytes: int, *options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        chosen = ",".join([f"size={kilobytes}k", *options])
        words = ["mount", "-t", "tmpfs", "-o", chosen, "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def check_last(run: Path) -> int:
    """The last checkpoint, if there is one, loads and is sound; its step."""
    if not (run / "last.safetensors").exists():
        return 0
    found = load_run(run)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(found).values())
    assert not list(run.glob(".*.partial")), "what is half written takes no room"
    return found.step


def test_a_disk_that_is_really_full(
    small_disk: Callable[..., Path], learnable_store: Path, whole: Run
) -> None:
    """From nearly nothing to just too small; then the disk gets larger, and the same call finishes."""
    lines: list[str] = []
    steps: set[int] = set()
    for kilobytes in (4, 24, 60, 260, 400, 480, 560, 640, 3000):
        disk = small_disk(kilobytes)
        config = small_config(learnable_store, disk / "run", **CHANGES)
        try:
            train(config)
        except StorageError as refusal:
            lines.append(str(refusal))
            steps.add(check_last(disk / "run"))
        else:
            steps.add(CHANGES["steps"])
            assert_same(whole, load_run(disk / "run"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert_same(whole, train(config))
    assert len(lines) > 3
    for line in lines:
        assert "no space left on device" in line
        assert "free some space and run the same command again" in line
        assert "\n" not in line
    assert len(steps) > 2, "the disk was full at different steps"


class Refusing:
    """Lets `calls` calls of an operation through, then refuses one."""

    def __init__(self, real: Callable[..., Any], calls: int, code: int) -> None:
        self.real, self.left, self.code = real, calls, code

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.left -= 1
        if self.left == -1:
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*arguments, **keywords)


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_refused_at_any_file_the_same_call_finishes(
    learnable_store: Path, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    for calls in (0, 1, 2, 3, 5, 8):
        config = small_config(learnable_store, tmp_path / f"run{calls}", **CHANGES)
        with monkeypatch.context() as patch:
            patch.setattr(os, operation, Refusing(getattr(os, operation), calls, errno.EIO))
            with pytest.raises(StorageError, match=r"input/output error.*; check the disk") as caught:
                train(config)
            assert caught.value.exit_code == 4
        check_last(tmp_path / f"run{calls}")
        assert_same(whole, train(config))


def test_a_line_of_the_record_is_written_whole_or_not_at_all(small_disk: Callable[..., Path]) -> None:
    disk = small_disk(16)

    def fill() -> None:
        for step in range(10_000):
            append_metrics(disk, {"step": step, "text": "x" * 100})

    with pytest.raises(StorageError, match="no space left"):
        fill()
    assert (disk / "metrics.jsonl").read_bytes().endswith(b"}\n")
    written = len(read_metrics(disk))
    assert [line["step"] for line in read_metrics(disk)] == list(range(written))
    assert written > 20


@pytest.mark.parametrize("refused", ["pictures", "tensorboard"])
def test_what_only_shows_the_training_does_not_stop_it(
    learnable_store: Path, whole: Run, tmp_path: Path, refused: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A file lies where the folder would have to be."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole.path / "config.json", run)
    (run / refused).write_text("in the way")
    assert_same(whole, train(small_config(learnable_store, run, **CHANGES)))
    words = "no picture of step 8" if refused == "pictures" else "no more curves for TensorBoard"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(words in warning for warning in warnings)
    assert refused == "pictures" or len(warnings) == 1


def test_a_read_only_place_is_refused_in_one_line(
    small_disk: Callable[..., Path], learnable_store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(4000)
    config = small_config(learnable_store, disk / "run", **CHANGES)
    train(config)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for folder in ("run", "new"):
        with pytest.raises(StorageRefused, match=r"read-only file system.*; choose another"):
            train(small_config(learnable_store, disk / folder, **CHANGES))
    assert load_run(disk / "run").finished, "what is there can be read"
    words = ["train", "--task", "depth", "--store", str(learnable_store), "--run", str(disk / "x")]
    assert command(words) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: cannot write the run folder")
    assert error.count("\n") == 1


def test_no_permission_is_refused_in_one_line(
    learnable_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root everything is permitted, so the system's answer is given in its place."""
    monkeypatch.setattr(os, "mkdir", Refusing(os.mkdir, 0, errno.EACCES))
    with pytest.raises(StorageRefused, match=r"permission denied; choose another place with --run"):
        train(small_config(learnable_store, tmp_path / "run", **CHANGES))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", Refusing(os.replace, 0, errno.EACCES))
        with pytest.raises(StorageRefused, match=r"permission denied; choose another place with --run"):
            train(small_config(learnable_store, tmp_path / "run", **CHANGES))
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_a_start_that_came_to_nothing_is_no_foreign_folder(
    learnable_store: Path, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its configuration was written, or before its first checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "train.log").write_text("")
    (run / ".config.json.partial").write_text('{"ta')
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", Refusing(checkpoint.save_file, 0, errno.ENOSPC))
        with pytest.raises(StorageError):
            train(small_config(learnable_store, run, **CHANGES))
    assert read_metrics(run), "it had begun"
    (run / "best.safetensors").write_text("of another configuration")
    assert_same(whole, train(small_config(learnable_store, run, **CHANGES)))
