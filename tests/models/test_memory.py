"""The computed budget of memory says what the allocator says."""

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that computes it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_memory")


@pytest.mark.parametrize(("precision", "checkpointing"), [("float32", False), ("bfloat16", True)])
def test_counting_without_values_gives_what_the_allocator_says(
    memory: ModuleType, precision: str, checkpointing: bool
) -> None:
    spec = memory.small_spec(32, 8, checkpointing=checkpointing)
    counted = memory.budget(spec, 2, precision=precision)
    assert counted.peak == pytest.approx(memory.measured_peak(spec, 2, precision=precision), rel=0.03)
    weights = 4 * sum(memory.MMDiff.from_spec(spec).parameter_counts().values())
    assert (counted.weights, counted.gradients, counted.average) == (weights, weights, weights)
    assert counted.optimiser == pytest.approx(2 * weights, rel=0.01)  # and a counter of steps for each
    assert counted.saved + 4 * weights + counted.inputs < counted.peak


def test_checkpointing_and_bfloat16_each_need_less(memory: ModuleType) -> None:
    spec = memory.small_spec(32, 8)
    frugal = memory.small_spec(32, 8, checkpointing=True)
    plain = memory.budget(spec, 2)
    assert memory.budget(frugal, 2).saved < 0.4 * plain.saved
    assert memory.budget(spec, 2, precision="bfloat16").saved < plain.saved


@pytest.mark.slow
def test_the_papers_model_trains_at_batch_8_within_24_gb(memory: ModuleType) -> None:
    aggregator = dataclasses.replace(memory.PAPER.aggregator, checkpointing=True)
    frugal = dataclasses.replace(memory.PAPER, aggregator=aggregator)
    assert memory.budget(frugal, 8).peak < 12e9
    assert memory.budget(memory.PAPER, 8).peak > 24e9  # so that the switch is needed, as the notes say
