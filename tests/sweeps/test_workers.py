"""On a cluster: a killed worker costs time and no run, and a part that loses each worker is listed."""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from distributed import LocalCluster

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.sweeps import sweep
from mmdiff_cache.sweeps.plan import plan_sweep
from mmdiff_cache.sweeps.run import SweepResult
from mmdiff_cache.training.checkpoint import LAST, read_group
from mmdiff_cache.training.folder import locked
from mmdiff_cache.training.run import load_run
from tests.sweeps.conftest import quick

pytestmark = pytest.mark.slow


@contextmanager
def killing(due: Callable[[int], bool], times: int) -> Generator[list[int]]:
    """Kill the workers of this process, all of them, when it is due after so many deaths."""
    over, killed = threading.Event(), list[int]()

    def watch() -> None:
        while not over.wait(0.05):
            if len(killed) < times and due(len(killed)):
                for child in psutil.Process().children(recursive=True):
                    if "spawn_main" in " ".join(child.cmdline()):
                        child.kill()
                        killed.append(child.pid)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield killed
    finally:
        over.set()
        watcher.join()


def endless(store: Path) -> TrainConfig:
    return quick(store, steps=100_000, checks=10_000)


def weights(result: SweepResult) -> dict[str, dict[str, list[float]]]:
    return {
        file.parent.name: {key: value.flatten().tolist() for key, value in read_group(file, "raw").items()}
        for file in result.path.glob(f"*/{LAST}")
    }


def test_a_killed_worker_costs_no_run(learnable_store: Path, tmp_path: Path) -> None:
    configs = [quick(learnable_store, steps=200, seed=seed) for seed in (0, 1)]
    steady = sweep(configs, tmp_path / "steady", evaluate=False)
    out = tmp_path / "killed"
    with killing(lambda deaths: any(out.glob(f"*/{LAST}")), times=1) as killed:
        result = sweep(configs, out, workers=1, evaluate=False)
    assert len(killed) == 1
    assert not result.failed
    assert any("going on from step" in log.read_text() for log in out.glob("*/train.log"))
    assert weights(result) == weights(steady)


def test_on_a_joined_cluster_an_interrupted_sweep_stops(learnable_store: Path, tmp_path: Path) -> None:
    """The worker lets go of the run, which can go on at once."""
    (folder,) = (run.folder for run in plan_sweep([endless(learnable_store)], tmp_path / "out").runs)

    def interrupt(done: int, total: int, state: str) -> None:
        if (folder / LAST).exists():
            raise KeyboardInterrupt

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        with pytest.raises(KeyboardInterrupt):
            sweep(
                [endless(learnable_store)],
                tmp_path / "out",
                scheduler=cluster.scheduler_address,
                progress=interrupt,
            )
        for _ in range(60):
            try:
                with locked(folder):
                    break
            except ConfigError:
                time.sleep(1)
        else:
            pytest.fail("it trains on")
    assert 0 < load_run(folder).step < 100_000


def test_one_that_dies_each_time_is_listed(learnable_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"

    def begun(deaths: int) -> bool:
        """Whether it was taken up again since the last death."""
        return sum(log.read_text().count("training on") for log in out.glob("*/train.log")) > deaths

    with killing(begun, times=2) as killed:
        result = sweep([quick(learnable_store, steps=5000)], out, workers=1, evaluate=False)
    assert len(killed) == 2
    assert ["died each time" in reason for reason in result.failed.values()] == [True]
