"""The profile accounts for the run's time, changes no byte, and is silent unless it is asked for."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.extraction.profile import PARTS, Profile
from mmdiff_cache.extraction.run import extract


def contents(store: Path) -> dict[str, bytes]:
    files = (path.relative_to(store) for path in store.rglob("*") if path.is_file())
    return {str(f): (store / f).read_bytes() for f in files if f.parts[0] not in ("logs", "lock")}


def test_the_models_own_thread_is_accounted_for(config: ExtractConfig, tmp_path: Path) -> None:
    """Its parts follow each other, so they add up to the wall time, less the little between them."""
    profile = Profile()
    store = extract(config, profile=profile).path
    seconds = profile.seconds
    assert all(seconds[part] > 0 for part in PARTS)
    own = sum(seconds[part] for part in PARTS if part not in ("reading", "staging"))
    assert 0.3 * profile.wall < own <= profile.wall
    log = (store / "logs" / "extract.log").read_text()
    assert "where the time went" in log
    assert all(f"\n{part}" in log for part in (*PARTS, "wall"))
    plain = extract(replace(config, store=str(tmp_path / "plain"))).path
    assert contents(plain) == contents(store)
    assert "where the time went" not in (plain / "logs" / "extract.log").read_text()


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
