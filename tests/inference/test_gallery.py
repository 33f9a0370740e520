"""Sheets for aggregators of every kind: what timesteps count is drawn where there is something to draw."""

import dataclasses
from pathlib import Path

import pytest

from mmdiff_cache.inference.gallery import show, timestep_sheet
from mmdiff_cache.training.run import train
from tests.training.conftest import TINY, small_config


@pytest.mark.parametrize("kind", ["token", "global", "concat"])
def test_weights_are_drawn_where_there_are_some(kind: str, learnable_store: Path, tmp_path: Path) -> None:
    run = train(
        small_config(
            learnable_store, tmp_path / "run", steps=1, aggregator=dataclasses.replace(TINY, kind=kind)
        )
    )
    shown = show(run, "train", 1)
    sheet = timestep_sheet(shown, "title", "note")
    if kind == "concat":
        assert sheet is None
        return
    assert sheet is not None
    assert len(sheet.rows) == len(run.config.layers or ())
    assert all(len(row) == len(run.config.timesteps or ()) for row in sheet.rows)
