"""What a run measured is what the next plan says, exactly where it can be exact, and names its source."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.backbones.timing import time_blocks
from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.extraction.measured import FILE, known_speed, machine_of
from mmdiff_cache.extraction.plan import on_workers, plan, with_time
from mmdiff_cache.extraction.resolve import resolve
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.store.reader import Store
from tests.tiny_sd3 import save_tiny_sd3


@pytest.fixture(scope="module")
def config(tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    return ExtractConfig(
        splits=("train", "val"),
        limit=5,
        resolution=32,
        batch_size=2,
        partition_size=4,
        backbone=str(tiny_flux_folder),
        store=str(tmp_path_factory.mktemp("measured") / "data" / "scenes" / "tiny"),
    )


@pytest.fixture(scope="module")
def store(config: ExtractConfig) -> Store:
    return extract(config)


def test_files_and_raw_bytes_come_out_as_planned(config: ExtractConfig, store: Store) -> None:
    planned = plan(config)
    there = [path for path in store.path.rglob("*") if path.is_file()]
    counted = [
        path for path in there if path.suffix == "" or ".zarr" in str(path) or "partitions" in path.parts
    ]
    outside = {"manifest.json", "lock", "lock.json"}
    counted = [path for path in counted if path.name not in outside and "logs" not in path.parts]
    assert len(counted) == planned.files
    raw = 0
    for split in store.splits:
        group = zarr.open_group(store.path / f"{split}.zarr", mode="r")
        for _, array in group.members(max_depth=None):
            if isinstance(array, zarr.Array) and array.dtype.kind in "fiub":
                raw += math.prod(array.shape) * np.dtype(array.dtype).itemsize
    assert raw == planned.raw_bytes


def test_the_next_plan_knows_speed_and_size_and_says_from_where(config: ExtractConfig, store: Store) -> None:
    planned = plan(replace(config, limit=20))
    assert planned.ratios is not None
    assert planned.cost.speed is not None
    assert planned.ratios.source == planned.cost.speed.source == str(store.path / FILE)
    text = str(planned)
    assert str(store.path / FILE) in text
    assert "a disk that reads less than" in text
    written = [path for path in store.path.rglob("c.*") if path.parent.name == "hidden_states"]
    hidden = sum(path.stat().st_size for path in written)
    one = plan(config)
    grid = math.prod(one.schema.grid) * one.schema.channels * 2
    raw = grid * len(one.schema.layers) * len(one.schema.timesteps) * one.total
    assert planned.ratios.hidden_states == pytest.approx(raw / hidden, rel=1e-9)
    stored = sum(path.stat().st_size for path in store.path.rglob("c.*")) + 2 * 4096
    assert plan(config).stored_bytes == pytest.approx(stored, rel=0.1)
    others = replace(config, batch_size=4)
    assert known_speed(resolve(others), machine_of("auto")) is None, "other batches have another speed"


@pytest.mark.parametrize(
    "more", [{"concepts": {}}, {"cross_attention": True}, {"discriminative": ("dinov3-vitb16",)}]
)
def test_a_run_with_other_company_says_nothing_about_speed(
    config: ExtractConfig, store: Store, more: dict[str, object]
) -> None:
    known = resolve(config)
    assert known_speed(known, machine_of("cpu")) is not None
    assert known_speed(replace(known, **more), machine_of("cpu")) is None  # type: ignore[arg-type]


def test_another_store_of_the_same_backbone_is_a_source_too(
    config: ExtractConfig, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = replace(config, store=str(tmp_path / "new"))
    assert plan(elsewhere).cost.speed is None
    monkeypatch.setenv("MMDIFF_DATA", str(store.path.parent.parent))
    assert plan(elsewhere).cost.speed is not None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"samples": 1}', "null"])
def test_damaged_figures_are_no_figures(
    config: ExtractConfig, tmp_path: Path, damage: str, store: Store
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / FILE).write_text(damage)
    assert plan(replace(config, store=str(tmp_path))).cost.speed is None
    nothing = {**json.loads((store.path / FILE).read_text()), "operations_per_second": 0.0}
    (tmp_path / FILE).write_text(json.dumps(nothing))
    assert plan(replace(config, store=str(tmp_path))).cost.speed is None


def test_blocks_are_timed_where_nothing_is_known(config: ExtractConfig, tmp_path: Path) -> None:
    timed = with_time(plan(replace(config, store=str(tmp_path / "new"))))
    assert timed.cost.seconds is not None
    assert timed.cost.seconds > 0
    assert "timed: two of its blocks with random weights" in str(timed)
    assert timed.cost.gpus == on_workers(timed, 2).cost.gpus == 1, "processes share the CPU's cores"
    assert timed.cost.speed is not None
    rack = replace(timed.cost, machine="some GPU", speed=replace(timed.cost.speed, value=1e12), gpus=8)
    assert rack.seconds == pytest.approx(timed.cost.operations / 8e12)
    assert "on each of 8 GPUs" in str(rack)


def test_blocks_of_sd3_are_timed_too(tmp_path: Path) -> None:
    info = describe(str(save_tiny_sd3(tmp_path / "sd3")))
    taken = time_blocks(
        info, resolution=info.resolution, text_length=8, batch=2, device="cpu", dtype="float32"
    )
    assert taken.seconds > 0
    assert taken.activation_bytes is None
