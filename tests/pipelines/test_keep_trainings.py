"""Trainings without their weights: a sweep finds them done, and what they found can be tested again."""

import shutil
import tarfile
from pathlib import Path

import pytest

from mmdiff_cache.errors import CheckpointError
from mmdiff_cache.experiments.statistics import paired_difference
from mmdiff_cache.inference.predict import load_model
from mmdiff_cache.sweeps import sweep
from mmdiff_cache.sweeps.plan import SCORED, plan_sweep
from pipelines.keep_trainings import pack
from tests.sweeps.conftest import quick


def test_unpacked_in_their_place_they_are_done(learnable_store: Path, tmp_path: Path) -> None:
    configs = [quick(learnable_store, timesteps=times) for times in ((0.26,), (0.78, 0.26))]
    trainings = tmp_path / "trainings"
    sweep(configs, trainings)
    runs = [run.folder for run in plan_sweep(configs, trainings).runs]
    before = paired_difference(*runs, "segmentation", "miou", 200)
    archive = tmp_path / "kept.tar.xz"
    assert pack(tmp_path, archive) == 2
    again = tmp_path / "again.tar.xz"
    pack(tmp_path, again)
    assert again.read_bytes() == archive.read_bytes()
    assert pack(tmp_path, tmp_path / "part.tar.xz", ["*timesteps-0.26*"]) == 1
    shutil.rmtree(trainings)
    with tarfile.open(archive) as found:
        found.extractall(tmp_path, filter="data")
    assert [run.state for run in plan_sweep(configs, trainings).runs] == [SCORED, SCORED]
    assert paired_difference(*runs, "segmentation", "miou", 200) == before
    with pytest.raises(CheckpointError, match="holds no 'ema' weights"):
        load_model(runs[0])


def test_what_is_not_scored_is_left_out(learnable_store: Path, tmp_path: Path) -> None:
    sweep([quick(learnable_store)], tmp_path / "trainings", evaluate=False)
    assert pack(tmp_path, tmp_path / "kept.tar.xz") == 0
