"""Every benchmark still runs, at its smallest size; what it measures there means nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALLEST = {
    "bench_cache": "--samples 8 --rounds 2",
    "bench_extract": "--samples 8 --rounds 2",
    "bench_quantisation": "--samples 1",
    "bench_read": "--rounds 2",
    "bench_sweep": "--samples 4 --grid 8 --channels 64 --decoders 2 --epochs 1 --rounds 2",
    "bench_train": "--rounds 2 --steps 1 --batch 1",
    "bench_write": "--rounds 2",
}


def test_none_is_forgotten() -> None:
    assert set(SMALLEST) == {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs_and_prints_a_table(name: str) -> None:
    words = [sys.executable, f"benchmarks/{name}.py", *SMALLEST[name].split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "|---" in done.stdout
