"""A store that was harmed anywhere has, after repair, the bytes of one that never was."""

import json
import shutil
from pathlib import Path

import pytest

from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.errors import StoreError
from mmdiff_cache.extraction.repair import repair
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.verify import verify
from tests.store.synthetic import counted_files


@pytest.fixture(scope="module")
def whole(tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five extracted scenes in three partitions."""
    return extract(
        ExtractConfig(
            backbone=str(tiny_flux_folder),
            store=str(tmp_path_factory.mktemp("repair") / "store"),
            splits=("val",),
            limit=5,
            resolution=64,
            batch_size=2,
            partition_size=2,
            layers=("double.1", "single.2"),
            timesteps=(0.5, 0.1),
            concepts={"two": ("near", "far"), "also": ("object", "background")},
        )
    ).path


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


HARMS = {
    "val.zarr/hidden_states/c.3.0.0.0.0.0.0": flip,
    "val.zarr/labels/depth/map/c.0.0.0": flip,
    "val.zarr/images/c.2.0.0.0": Path.unlink,
    "val.zarr/latents/zarr.json": flip,
    "val.zarr/timestep/c.0": Path.unlink,
    "partitions/val-000001.json": flip,
    "partitions/val-000002.json": Path.unlink,
}


@pytest.mark.parametrize("name", HARMS)
def test_what_was_harmed_is_as_it_was(whole: Path, tmp_path: Path, name: str) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    HARMS[name](store / name)
    found = repair(store)
    assert found.sound, str(found)
    assert found.pending == 0
    assert counted_files(store) == counted_files(whole)


def test_all_harms_at_once_and_a_store_that_was_moved(whole: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "elsewhere"))
    for name, harm in HARMS.items():
        harm(store / name)
    assert repair(store).sound
    assert counted_files(store) == counted_files(whole)


def test_only_what_is_harmed_is_extracted_again(whole: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    flip(store / "val.zarr/hidden_states/c.3.0.0.0.0.0.0")
    shards = list((store / "val.zarr/hidden_states").glob("c.*"))
    before = {path: path.stat().st_mtime_ns for path in shards}
    repair(store)
    changed = {path.name for path in shards if path.stat().st_mtime_ns != before[path]}
    assert changed == {"c.2.0.0.0.0.0.0", "c.3.0.0.0.0.0.0"}, "the partition of the harmed sample, no other"


def test_a_sound_store_is_left_alone(whole: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    assert repair(store).sound
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_a_damaged_manifest_is_refused_with_the_way_forward(whole: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    stated = json.loads((store / "manifest.json").read_text())
    stated["config"]["limit"] = 7
    (store / "manifest.json").write_text(json.dumps(stated))
    with pytest.raises(StoreError, match=r"cannot be repaired: restore manifest\.json"):
        repair(store)
    assert not verify(store).sound


def test_what_cannot_be_had_again_stays_as_it_is(whole: Path, tmp_path: Path) -> None:
    """The backbone's weights are gone: nothing is taken away, and verify still names the harm."""
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    flip(store / "val.zarr/hidden_states/c.3.0.0.0.0.0.0")
    before = counted_files(store)
    backbone = Path(str(open_store(store).manifest.config["backbone"]))
    hidden = backbone.with_name("hidden")
    backbone.rename(hidden)
    try:
        with pytest.raises(Exception, match=backbone.name):
            repair(store)
    finally:
        hidden.rename(backbone)
    assert counted_files(store) == before
    assert [finding.where for finding in verify(store).findings] == ["val.zarr/hidden_states/c.3.0.0.0.0.0.0"]
