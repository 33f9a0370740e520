"""Runs that share a reading end as they would alone, bit for bit, and the store is read once for all."""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.store.chunks import ChunkReader
from mmdiff_cache.sweeps import sweep
from mmdiff_cache.sweeps.plan import plan_sweep
from mmdiff_cache.sweeps.results import read_result
from mmdiff_cache.sweeps.run import SweepResult
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.run import load_run, train
from tests.sweeps.conftest import contents, quick


def varied(store: Path) -> list[TrainConfig]:
    """Decoders, layers, timesteps, tasks, vocabularies, lengths and seeds that can all share a reading."""
    return [
        quick(store),
        quick(store, seed=1, decoder="dpt"),
        quick(store, layers=("single.1", "single.5"), timesteps=(0.26,), concepts="depth"),
        quick(store, task="depth", timesteps=(0.78, 0.001), steps=2),
        quick(store, concepts="none", layers=("single.3",), precision="bfloat16"),
    ]


@pytest.fixture(scope="module")
def shared(learnable_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return sweep(varied(learnable_store), tmp_path_factory.mktemp("sweeps") / "varied")


def test_they_are_one_reading(learnable_store: Path, tmp_path: Path) -> None:
    plan = plan_sweep(varied(learnable_store), tmp_path)
    assert [len(part) for part in plan.parts] == [5]


@pytest.mark.parametrize("number", range(5))
def test_each_run_ends_as_it_does_alone(
    number: int, shared: SweepResult, learnable_store: Path, tmp_path: Path
) -> None:
    assert not shared.failed
    config = varied(learnable_store)[number]
    folder = plan_sweep([*varied(learnable_store)], shared.path).runs[number].folder
    kept = tmp_path / "kept"
    shutil.move(folder, kept)
    alone = train(replace(config, run=str(folder)))
    assert contents(kept) == contents(folder)
    assert load_run(kept).scores == alone.scores
    scores = evaluate(alone).scores
    found = read_result(kept)
    assert found.scores == read_result(alone.path).scores
    assert found.scores["test"][found.headline] == scores[found.headline]
    shutil.rmtree(folder)
    shutil.move(kept, folder)


def chunks_read(configs: list[TrainConfig], out: Path) -> int:
    """Chunks of the store that a sweep takes from its files; nothing is kept in memory."""
    count = 0
    read = ChunkReader.read

    def counting(self: ChunkReader, layout: object, wanted: list[tuple[str, list[object]]]) -> None:
        nonlocal count
        count += sum(len(chunks) for name, chunks in wanted if "hidden_states" in name)
        read(self, layout, wanted)  # type: ignore[arg-type]

    with patch.object(ChunkReader, "read", counting):
        result = sweep([replace(config, memory=0) for config in configs], out, evaluate=False)
    assert not result.failed
    return count


def test_four_decoders_read_little_more_than_one(learnable_store: Path, tmp_path: Path) -> None:
    four = [quick(learnable_store, seed=seed) for seed in range(4)]
    one = chunks_read(four[:1], tmp_path / "one")
    assert one > 0
    assert chunks_read(four, tmp_path / "four") <= 1.2 * one
