"""The controls: rows differ in their features and in nothing else; the whole script runs at its smallest."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest

from mmdiff_cache.config import TrainConfig
from pipelines import controls

FEATURES = {"stores", "timesteps", "source", "run"}


@pytest.mark.parametrize("task", controls.TASKS)
def test_rows_differ_in_their_features_alone(task: str, tmp_path: Path) -> None:
    rows = controls.row_configs(task, controls.WHOLE, 1, tmp_path)
    assert len(rows) == 4 + len(controls.NINE)
    reference = rows[controls.FULL]
    for config in rows.values():
        for field in dataclasses.fields(TrainConfig):
            same = getattr(config, field.name) == getattr(reference, field.name)
            assert same or field.name in FEATURES, field.name
    assert len({config.run for config in rows.values()}) == len(rows)
    assert {row.timesteps for row in rows.values()} >= {(t,) for t in controls.NINE}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_script_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["controls.py", "--work", str(tmp_path), "--workers", "2", "--quick"])
    controls.main()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    rows = 4 + len(controls.NINE)
    assert len(lines) == rows * len(controls.TASKS) * len(controls.QUICK.seeds)
    full, random = (
        next(line for line in lines if line["row"] == row and line["task"] == "depth")
        for row in (controls.FULL, "random backbone")
    )
    assert full["test"] != random["test"]
    assert "position only" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "loss-depth.png").stat().st_size > 1000
    shutil.rmtree(tmp_path / "runs")
    table = (tmp_path / "table.md").read_text()
    controls.main()
    assert not (tmp_path / "runs").exists(), "nothing is trained twice"
    assert (tmp_path / "table.md").read_text() == table
