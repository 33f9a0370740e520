"""The controls: rows differ in their features and in nothing else; the whole script runs at its smallest."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from mmdiff_cache.config import TrainConfig
from pipelines import controls

FEATURES = {"stores", "timesteps", "source", "run"}


@pytest.mark.parametrize("task", controls.TASKS)
def test_rows_differ_in_their_features_alone(task: str, tmp_path: Path) -> None:
    rows = controls.row_configs(task, controls.WHOLE, 1, tmp_path)
    assert len(rows) == 3 + len(controls.NINE)
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
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["rows"]["depth"]
    assert len(rows) == 3 + len(controls.NINE)
    assert all(len(row["test"]) == len(controls.QUICK.seeds) for row in rows.values())
    assert rows[controls.FULL]["test"] != rows["random backbone"]["test"]
    assert "position only" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "loss-depth.png").stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("last.safetensors")}
    controls.main()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("last.safetensors")}
