"""A plan is complete, pure, and refuses what cannot be before anything runs."""

import os
import shutil
from collections import namedtuple
from dataclasses import fields, replace
from pathlib import Path

import pytest
from PIL import Image

from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.errors import ConfigError, DataError, StorageError
from mmdiff_cache.extraction.cost import show_duration
from mmdiff_cache.extraction.plan import (
    bytes_by_array,
    check_disk,
    existing_parent,
    plan,
    show_bytes,
)
from mmdiff_cache.extraction.resolve import resolve

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def config(tiny_flux_folder: Path, tmp_path: Path) -> ExtractConfig:
    return ExtractConfig(
        backbone=str(tiny_flux_folder), store=str(tmp_path / "store"), resolution=64, limit=6
    )


def test_resolving_fills_every_field_and_changes_nothing_twice(config: ExtractConfig) -> None:
    resolved = resolve(config)
    empty = [f.name for f in fields(resolved) if getattr(resolved, f.name) is None]
    assert empty == ["data_root", "generation"]  # scenes have no files, and no model draws them
    assert resolve(resolved) == resolved
    assert resolved.splits == ("train", "val", "test")
    assert resolved.layers == ("single.0", "single.1", "single.2", "single.3")


def test_lists_and_paths_from_python_are_as_good_as_tuples_and_text(
    config: ExtractConfig, tmp_path: Path
) -> None:
    written = resolve(replace(config, layers=("single.1",), timesteps=(0.5,)))
    python = replace(config, layers=["single.1"], timesteps=[0.5], store=tmp_path / "store")  # type: ignore[arg-type]
    assert resolve(python) == written
    with pytest.raises(ConfigError, match="limit must be int"):
        resolve(replace(config, limit=2.5))  # type: ignore[arg-type]


def test_the_data_set_brings_its_backbone_and_the_paper_its_defaults() -> None:
    resolved = resolve(ExtractConfig(dataset="images", data_root="."))
    assert resolved.backbone == "flux-dev"
    assert resolved.layers == ("single.4", "single.15", "single.26", "single.37")
    assert resolved.timesteps == (0.78, 0.52, 0.26, 0.001)
    assert resolved.resolution == 512
    assert resolved.dtype == "bfloat16"
    assert (resolved.batch_size, resolved.partition_size) == (4, 64)
    assert resolved.concepts is not None
    assert resolved.concepts["depth"] == ("depth", "surface", "object", "near", "far")


def test_stores_go_below_the_data_folder(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMDIFF_DATA", raising=False)
    bare = replace(config, store=None)
    assert resolve(bare).store == str(tmp_path / "data" / "scenes" / "tiny-flux")
    monkeypatch.setenv("MMDIFF_DATA", str(tmp_path / "elsewhere"))
    assert resolve(bare).store == str(tmp_path / "elsewhere" / "scenes" / "tiny-flux")


@pytest.mark.parametrize(
    ("asked", "batch", "partition"),
    [
        ({}, 8, 64),
        ({"batch_size": 6}, 6, 66),
        ({"partition_size": 20}, 5, 20),
        ({"partition_size": 7}, 7, 7),
        ({"batch_size": 2, "partition_size": 4}, 2, 4),
    ],
)
def test_partitions_are_whole_batches(
    config: ExtractConfig, asked: dict[str, int], batch: int, partition: int
) -> None:
    resolved = resolve(replace(config, **asked))
    assert (resolved.batch_size, resolved.partition_size) == (batch, partition)


def test_the_plan_knows_the_samples_and_the_arrays(config: ExtractConfig) -> None:
    planned = plan(replace(config, splits=("test", "val")))
    assert list(planned.samples) == ["test", "val"]
    assert planned.samples["val"] == tuple(f"scenes-val-{index:06d}" for index in range(6))
    assert planned.total == 12
    assert planned.schema.grid == (8, 8)
    assert planned.schema.channels == 32
    assert [label.spec.name for label in planned.schema.labels] == [
        "segmentation",
        "material",
        "saliency",
        "depth",
    ]
    assert planned.raw_bytes == planned.stored_bytes > 12 * 4 * 4 * 8 * 8 * 32 * 2
    assert planned.ratios is None, "nothing was measured yet"
    assert sum(bytes_by_array(planned).values()) > 0.98 * planned.raw_bytes


def test_planning_writes_nothing_and_prints_what_a_person_needs(
    config: ExtractConfig, tmp_path: Path
) -> None:
    text = str(plan(replace(config, prompts="oracle")))
    assert not list(tmp_path.iterdir())
    for word in (
        "train 6, val 6, test 6",
        "upper bound",
        "tiny-flux",
        "8 x 8 tokens",
        "raw in",
        "files",
        "unknown (it follows from the time)",
    ):
        assert word in text
    assert str(tmp_path / "store") in text
    assert "free disk" in text


def test_cost_grows_with_what_is_asked(config: ExtractConfig) -> None:
    base = plan(config).cost.operations
    assert plan(replace(config, limit=3)).cost.operations == base / 2
    assert plan(replace(config, timesteps=(0.5,))).cost.operations == base / 4
    assert plan(replace(config, layers=("single.0",))).cost.operations < base
    assert plan(replace(config, resolution=128)).cost.operations > 3 * base


def test_the_cost_of_flux_is_the_known_one() -> None:
    """One forward of FLUX.1-dev at 512 px with 512 text tokens is 21.5 TFLOP, counted with a profiler."""
    planned = plan(
        ExtractConfig(backbone="flux-dev", limit=1, splits=("val",), timesteps=(0.5,), device="cuda")
    )
    assert planned.cost.operations == pytest.approx(21.5e12, rel=0.01)
    assert planned.cost.device == "cuda"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dataset": "coco"}, "data set 'coco' is not known; there are duts, images, nyu"),
        (
            {"dataset": "voc"},
            "data set 'voc' needs the folder of its files: --data-root DIR; get VOCtrainval",
        ),
        ({"backbone": "flux-pro"}, "'flux-pro' is neither a backbone"),
        ({"splits": ("training",)}, "split 'training' is not one of scenes: train, val, test"),
        (
            {"layers": ("single.4",)},
            r"layer single.4 is not a block of tiny-flux \(double.0..double.1, single.0..single.3\)",
        ),
        ({"layers": ("4",)}, "layer 4 is not a block"),
        ({"resolution": 65}, "must be a multiple of 8"),
        ({"prompts": "captions"}, "prompts must be one of empty, scene, oracle"),
        ({"dataset": "images"}, "--data-root DIR"),
        ({"data_root": "/tmp"}, "leave out --data-root"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_in_one_line(
    config: ExtractConfig, change: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        plan(replace(config, **change))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_times_beyond_pure_noise_are_refused(config: ExtractConfig) -> None:
    with pytest.raises(ConfigError, match=r"timesteps lie in \[0, 1\]"):
        replace(config, timesteps=(1.5,))


def test_a_sample_without_a_prompt_is_found_while_planning(config: ExtractConfig, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"sample_id": "scenes-train-000000", "prompt": "sand"}\n')
    with pytest.raises(DataError, match=r"no prompt for sample 'scenes-train-000001' and 4 more"):
        plan(replace(config, prompts=str(file)))


def test_a_folder_of_pictures_is_planned_as_it_lies(config: ExtractConfig, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "b.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    planned = plan(replace(config, dataset="images", data_root=os.path.relpath(tmp_path)))
    assert planned.samples == {"all": ("a.jpg", "b.png")}
    assert planned.config.data_root == str(tmp_path)
    assert not planned.schema.labels


def test_a_disk_that_is_too_small_is_named_with_what_is_missing(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10_000, 9_000, 1_000))
    planned = plan(config)
    assert planned.free_bytes == 1_000
    with pytest.raises(StorageError, match=r"1\.0 kB free; choose fewer --layers") as caught:
        check_disk(planned)
    assert caught.value.exit_code == 2
    check_disk(replace(planned, done=planned.total))
    with pytest.raises(StorageError, match="can take 7; choose"):
        check_disk(replace(planned, free_bytes=10**12, free_files=7))
    check_disk(replace(planned, free_bytes=10**12, free_files=None))


def test_a_store_below_a_file_is_refused(config: ExtractConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file is a file, a store must lie in a folder"):
        plan(replace(config, store=str(tmp_path / "file" / "store")))
    assert existing_parent(tmp_path / "a" / "b") == tmp_path


def test_sizes_and_durations_read_like_a_persons() -> None:
    assert [show_bytes(n) for n in (0, 999, 1_200, 123_456_789, 1.21e12)] == [
        "0 B",
        "999 B",
        "1.2 kB",
        "123 MB",
        "1.2 TB",
    ]
    assert [show_duration(s) for s in (0.2, 75, 600, 12_600, 400_000)] == [
        "1 s",
        "75 s",
        "10 min",
        "3.5 h",
        "4.6 days",
    ]
