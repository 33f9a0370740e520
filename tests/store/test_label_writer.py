"""A label set that comes later: beside the others, as safe as they are, and nothing else is touched."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from mmdiff_cache.errors import ConfigError, DamageError, StoreError, StoreIncomplete
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.store.convert import Selection, convert, plan_conversion
from mmdiff_cache.store.label_writer import open_label_writer
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.schema import LabelArray
from mmdiff_cache.store.summary import summarize
from mmdiff_cache.store.verify import verify
from mmdiff_cache.store.writer import open_writer
from tests.store.synthetic import (
    counted_files,
    ended_at_rename,
    make_manifest,
    write_partition,
    write_store,
)

PARTS = LabelArray(
    spec=LabelSpec(name="parts", kind="classes", classes=("head", "tail"), ignore=9),
    canvas=(6, 5),
    added=True,
)


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "store"))


def values(sample_id: str) -> np.ndarray:
    return np.random.default_rng(sum(sample_id.encode())).integers(0, 2, (3, 4)).astype(np.uint8)


def add(path: Path, label: LabelArray = PARTS, without: tuple[str, ...] = ()) -> list[str]:
    written: list[str] = []
    with open_label_writer(path, label) as writer:
        for split in writer.manifest.splits:
            for partition in writer.pending(split):
                with writer.begin(partition) as out:
                    for offset, name in enumerate(out.ids):
                        if name in without:
                            out.fail(offset, "no label file")
                        else:
                            small = np.resize(values(name), writer.manifest.schema.image_size)
                            out.write(offset, small, values(name), "0" * 64)
                    out.commit()
                written.append(partition.name)
    return written


def test_it_stands_beside_the_others_which_stay_as_they_were(store: Path, finished: Path) -> None:
    before = counted_files(store)
    assert add(store) == ["train-000000", "train-000001", "test-000000"]
    assert add(store) == []
    after = counted_files(store)
    assert [name for name in before if after[name] != before[name]] == ["manifest.json"]
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {
        "train.zarr", "test.zarr", "partitions"
    }  # fmt: skip
    reader = open_store(store)["train"]
    assert reader.label_specs["parts"] == PARTS.spec
    for n, name in enumerate(reader.ids):
        np.testing.assert_array_equal(reader.original_label("parts", n), values(name))
        np.testing.assert_array_equal(reader.labels("parts", [n])[0], np.resize(values(name), (8, 12)))
    np.testing.assert_array_equal(zarr.open_group(store / "train.zarr")["labels/parts/map"].shape, (6, 8, 12))
    assert verify(store).sound
    assert {label.name for label in summarize(open_store(store)).labels} == {
        "classes", "depth", "salient", "parts"
    }  # fmt: skip


def test_the_extraction_goes_on_as_if_it_were_not_there(store: Path, manifest: Manifest) -> None:
    add(store)
    whole = counted_files(store)
    with open_writer(store, manifest) as writer:
        assert writer.pending("train") == []
    (store / "train.zarr/hidden_states/c.1.0.0.0.0.0.0").unlink()
    write_store(store, manifest)
    assert counted_files(store) == whole


def test_a_sample_may_lack_it(store: Path) -> None:
    add(store, without=("train/001",))
    reader = open_store(store)["train"]
    assert [reader.state(n, "parts") for n in range(3)] == ["done", "failed", "done"]
    assert reader.state(1) == "done"
    reader.hidden_states([1])
    with pytest.raises(
        StoreIncomplete, match=r"label 'parts' of sample 'train/001' .* failed: no label file"
    ):
        reader.labels("parts", [0, 1])
    assert verify(store).sound


@pytest.mark.parametrize("harm", ["flip", "delete", "record"])
def test_damage_is_found_named_and_written_again(store: Path, harm: str) -> None:
    add(store)
    whole = counted_files(store)
    shard, record = (
        store / "train.zarr/labels/parts/map/c.0.0.0",
        store / "partitions/train-000000.parts.json",
    )
    if harm == "flip":
        data = bytearray(shard.read_bytes())
        data[len(data) // 3] ^= 8
        shard.write_bytes(data)
    elif harm == "delete":
        shard.unlink()
    else:
        record.write_bytes(record.read_bytes()[:-9])
    found = verify(store)
    assert not found.sound
    assert found.partitions == frozenset(), "features need not be extracted again"
    if harm != "flip":
        with pytest.raises(DamageError):
            open_store(store)["train"].labels("parts", [1])
    open_store(store)["train"].labels("depth", [1])
    assert add(store) == ["train-000000"]
    assert counted_files(store) == whole


@pytest.mark.parametrize("step", range(0, 22, 3))
def test_ended_at_any_rename_it_is_finished_by_the_same_command(
    store: Path, tmp_path: Path, step: int
) -> None:
    whole = Path(shutil.copytree(store, tmp_path / "whole"))
    add(whole)
    with ended_at_rename(step):
        add(store)
    reader = open_store(store)["train"]
    reader.hidden_states(range(6))
    for n in range(6):
        if "parts" in reader.label_specs and reader.state(n, "parts") == "done":
            np.testing.assert_array_equal(reader.original_label("parts", n), values(reader.ids[n]))
    add(store)
    assert counted_files(store) == counted_files(whole)


def test_samples_that_come_later_lack_it_until_it_is_added_again(store: Path) -> None:
    add(store)
    larger = make_manifest(train=9)
    with open_writer(store, larger, append=True) as writer:
        for partition in writer.pending("train"):
            write_partition(writer, partition)
    reader = open_store(store)["train"]
    assert [reader.state(n, "parts") for n in range(9)] == ["done"] * 6 + ["pending"] * 3
    with pytest.raises(StoreIncomplete, match="run the same 'labels add' again"):
        reader.labels("parts", [8])
    assert add(store) == ["train-000001", "train-000002"]
    np.testing.assert_array_equal(open_store(store)["train"].original_label("parts", 8), values("train/008"))


def test_it_goes_along_into_a_converted_store(store: Path, tmp_path: Path) -> None:
    add(store, without=("train/001",))
    convert(plan_conversion(store, tmp_path / "less", Selection(layers=["single.4"], limit=4)))
    reader = open_store(tmp_path / "less")["train"]
    assert [reader.state(n, "parts") for n in range(4)] == ["done", "failed", "done", "done"]
    np.testing.assert_array_equal(reader.original_label("parts", 3), values("train/003"))
    assert verify(tmp_path / "less").sound


def test_names_that_are_taken_and_places_that_are_no_store_are_refused(store: Path, tmp_path: Path) -> None:
    before = counted_files(store)
    taken = LabelArray(spec=LabelSpec(name="depth", kind="mask"), canvas=(1, 1), added=True)
    with pytest.raises(ConfigError, match="other labels called 'depth'"):
        open_label_writer(store, taken)
    with pytest.raises(StoreError, match="is not a store"):
        open_label_writer(tmp_path, PARTS)
    assert counted_files(store) == before
    add(store)
    other = LabelArray(spec=LabelSpec(name="parts", kind="mask"), canvas=(1, 1), added=True)
    with pytest.raises(ConfigError, match="other labels called 'parts'"):
        open_label_writer(store, other)
    larger = LabelArray(spec=PARTS.spec, canvas=(7, 5), added=True)
    with pytest.raises(ConfigError, match="hold at most"):
        open_label_writer(store, larger)
    with open_writer(store, make_manifest()), pytest.raises(StoreError, match="is being written"):
        open_label_writer(store, PARTS)
