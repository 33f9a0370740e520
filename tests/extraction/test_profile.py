"""The profile accounts for the run's time, changes no byte, and is silent unless it is asked for."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmdiff_cache.config import ExtractConfig, GenerationConfig
from mmdiff_cache.extraction.profile import PARTS, Profile
from mmdiff_cache.extraction.run import extract


def contents(store: Path) -> dict[str, bytes]:
    files = (path.relative_to(store) for path in store.rglob("*") if path.is_file())
    return {str(f): (store / f).read_bytes() for f in files if f.parts[0] not in ("logs", "lock")}


def test_the_models_own_thread_is_accounted_for(config: ExtractConfig, tmp_path: Path) -> None:
    """Its parts follow each other within the wall time; with those of the threads they make up most of it."""
    profile = Profile()
    store = extract(config, profile=profile).path
    seconds = profile.seconds
    assert {part for part in PARTS if not seconds[part]} == {"encoders"}, "none was wanted"
    own = sum(seconds[part] for part in PARTS if part not in ("reading", "staging"))
    assert own <= profile.wall
    assert sum(seconds.values()) > 0.5 * profile.wall
    log = (store / "logs" / "extract.log").read_text()
    assert "where the time went" in log
    assert all(f"\n{part}" in log for part in (*PARTS, "wall"))
    plain = extract(replace(config, store=str(tmp_path / "plain"))).path
    assert contents(plain) == contents(store)
    assert "where the time went" not in (plain / "logs" / "extract.log").read_text()


@pytest.mark.parametrize("mode", ["renoise", "trajectory"])
def test_so_is_that_of_a_drawing(config: ExtractConfig, tmp_path: Path, mode: str) -> None:
    (tmp_path / "prompts.txt").write_text("a near ball\na far ball\n")
    drawn = replace(
        config,
        dataset="prompts",
        splits=None,
        prompts=str(tmp_path / "prompts.txt"),
        generation=GenerationConfig(mode=mode, steps=4),  # type: ignore[arg-type]
    )
    profile = Profile()
    extract(drawn, profile=profile)
    assert {part for part in PARTS if not profile.seconds[part]} == {"encoders"}


def test_seconds_that_were_taken_are_not_taken_twice() -> None:
    """As a worker tells them with each partition, and its driver adds them."""
    worker, driver = Profile(), Profile()
    with worker.timing("text"):
        time.sleep(0.001)
    driver.add(worker.take())
    assert driver.seconds["text"] >= 0.001
    assert set(worker.take().values()) == {0.0}


def test_one_that_is_off_counts_nothing() -> None:
    profile = Profile(on=False)
    with profile.timing("text"):
        time.sleep(0.001)
    assert set(profile.seconds.values()) == {0.0}


@pytest.mark.gpu
def test_on_a_gpu_the_work_is_timed_and_not_its_launch() -> None:
    device, profile = torch.device("cuda"), Profile()
    matrix = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    with profile.timing("transformer", device):
        for _ in range(20):
            matrix = matrix @ matrix
    begun = time.perf_counter()
    torch.cuda.synchronize()
    assert profile.seconds["transformer"] >= 0.5 * (time.perf_counter() - begun)
