"""A compiled training: the same weights to rounding, and an interruption changes no bit."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.resolve import resolve
from mmdiff_cache.training.run import train
from tests.training.conftest import small_config

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def in_a_plain_process(store: Path, folder: Path) -> None:
    """Where nothing wraps our functions: the compiler cannot look through that."""
    script = (
        "import sys; from pathlib import Path; from tests.training.test_compilation import interrupted; "
        "interrupted(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, str(store), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def interrupted(store: Path, folder: Path) -> None:
    """Train compiled without a stop, and with one at step 3."""

    def stop(done: int, total: int, state: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    train(small_config(store, folder / "steady", compile=True, steps=6))
    config = small_config(store, folder / "interrupted", compile=True, steps=6)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=stop)
    train(config)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The raw weights of the last checkpoint."""
    return checkpoint.read_group(folder / "last.safetensors", "raw")


@pytest.mark.slow
def test_interrupted_or_not_and_close_to_a_plain_training(learnable_store: Path, tmp_path: Path) -> None:
    in_a_plain_process(learnable_store, tmp_path)
    steady, other = weights(tmp_path / "steady"), weights(tmp_path / "interrupted")
    assert [name for name in steady if not torch.equal(steady[name], other[name])] == []
    train(small_config(learnable_store, tmp_path / "plain", steps=6))
    plain = weights(tmp_path / "plain")
    assert plain.keys() == steady.keys()
    for name, values in plain.items():
        torch.testing.assert_close(steady[name], values, rtol=1e-3, atol=1e-3)


def test_by_default_only_cuda_compiles(learnable_store: Path) -> None:
    config = small_config(learnable_store)
    assert resolve(replace(config, device="cpu")).compile is False
    assert resolve(replace(config, device="cpu", compile=True)).compile is True


def test_a_plain_training_goes_on_compiled_and_back(learnable_store: Path, tmp_path: Path) -> None:
    """How a training runs is no part of what it is: another choice does not refuse its folder."""
    run = train(small_config(learnable_store, tmp_path / "run", steps=2))
    again = train(small_config(learnable_store, tmp_path / "run", steps=2, compile=True))
    assert again.finished
    assert again.path == run.path
