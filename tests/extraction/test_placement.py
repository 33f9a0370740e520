"""Where a run takes place, as far as it can be told without a GPU: torch counts as many as a test says."""

from dataclasses import replace

import pytest
import torch

from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.extraction.placement import visible_gpus, worker_count
from mmdiff_cache.extraction.plan import on_workers, plan


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def test_there_is_a_process_for_each_of_several_gpus(eight: None, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = ExtractConfig()
    counts = {workers: worker_count(auto, workers) for workers in (None, 0, 1, 8)}
    assert counts == {None: 8, 0: 0, 1: 1, 8: 8}
    with pytest.raises(ConfigError, match="9 workers were asked, but 8 GPUs are visible"):
        worker_count(auto, 9)
    assert worker_count(ExtractConfig(device="cuda:3"), None) == 0, "one was named"
    assert worker_count(ExtractConfig(device="cpu"), None) == 0
    assert worker_count(ExtractConfig(device="cpu"), 9) == 9
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert worker_count(auto, None) == 0, "one GPU is used from this process"


def test_gpus_are_those_that_are_visible(eight: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_gpus("auto") == tuple("01234567")
    assert visible_gpus("cuda:3") == ("3",)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_gpus("auto") == ("GPU-a", "GPU-b")
    assert visible_gpus("cuda:1") == ("GPU-b",)


def test_a_plan_counts_the_gpus_that_the_run_will_use(eight: None, config: ExtractConfig) -> None:
    planned = plan(config)
    rack = replace(planned, cost=replace(planned.cost, machine="some GPU"))
    assert [on_workers(rack, workers).cost.gpus for workers in (None, 0, 1, 3)] == [8, 1, 1, 3]
    with pytest.raises(ConfigError):
        on_workers(rack, 9)
    assert on_workers(planned, 2).cost.gpus == 1, "processes share the CPU"
