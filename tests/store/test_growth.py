"""Appending: what is there stays readable at every moment, and the result has the bytes of one large run."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mmdiff_cache.errors import DataError, StoreError, StoreIncomplete
from mmdiff_cache.store import growth
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.verify import verify
from mmdiff_cache.store.writer import open_writer
from tests.store.synthetic import (
    IDENTITY,
    counted_files,
    ended_at_rename,
    make_features,
    make_manifest,
    make_sample,
    make_schema,
    write_partition,
)

LARGER = make_manifest(train=11, test=3)


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "store"))


def append(path: Path, manifest: Manifest) -> list[str]:
    """What `extract --append` does; the partitions that were written."""
    with open_writer(path, manifest, append=True) as writer:
        todo = [p for split in manifest.splits for p in writer.pending(split)]
        for partition in todo:
            write_partition(writer, partition)
    return [partition.name for partition in todo]


def whole(tmp_path: Path, manifest: Manifest) -> dict[str, bytes]:
    append(tmp_path / "whole", manifest)
    return counted_files(tmp_path / "whole")


def test_appended_in_steps_or_extracted_at_once_gives_the_same_bytes(store: Path, tmp_path: Path) -> None:
    assert append(store, make_manifest(train=7)) == ["train-000001"]
    assert append(store, LARGER) == ["train-000001", "train-000002"]
    assert append(store, LARGER) == []
    assert counted_files(store) == whole(tmp_path, LARGER)
    assert verify(store).sound


def test_a_split_may_be_added(store: Path, tmp_path: Path) -> None:
    more = {**make_manifest().splits, "val": ("v/0", "v/1")}
    assert append(store, make_manifest(splits={"val": more["val"]})) == ["val-000000"]
    assert counted_files(store) == whole(tmp_path, make_manifest(splits=more))


def test_old_samples_can_be_read_before_the_new_ones_are_there(store: Path, manifest: Manifest) -> None:
    before = open_store(store)
    open_writer(store, LARGER, append=True).close()
    after = open_store(store)["train"]
    truth = make_features(manifest.schema, list(manifest.splits["train"])).hidden_states
    for reader in (after, before["train"]):
        np.testing.assert_array_equal(reader.hidden_states(range(6)), truth[:, 0])
    assert [after.state(n) for n in range(11)] == ["done"] * 6 + ["pending"] * 5
    with pytest.raises(StoreIncomplete, match="train/006"):
        after.hidden_states([6])
    with pytest.raises(StoreIncomplete, match="train/006"):
        after.images([5, 6])
    found = verify(store)
    assert (found.sound, found.samples, found.pending) == (True, 9, 5)


@pytest.mark.parametrize("step", range(24))
def test_a_change_that_is_interrupted_is_completed_by_the_next_writer(
    store: Path, manifest: Manifest, tmp_path: Path, step: int
) -> None:
    """Ended at every rename: readers go on reading, and the same command finishes with the same bytes."""
    with ended_at_rename(step):
        open_writer(store, LARGER, append=True).close()
    reader = open_store(store)["train"]
    truth = make_features(manifest.schema, list(manifest.splits["train"])).hidden_states
    np.testing.assert_array_equal(reader.hidden_states(range(6)), truth[:, 0])
    assert reader.prompts([5]) == ["a picture of train/005"]
    assert verify(store).sound
    assert append(store, LARGER) == ["train-000001", "train-000002"]
    assert counted_files(store) == whole(tmp_path, LARGER)


def test_another_run_than_the_appending_one_completes_it_too(store: Path, manifest: Manifest) -> None:
    """The change was decided when the next manifest was there."""
    body = (store / "manifest.json").read_bytes()
    with open_writer(store, LARGER, append=True):
        pass
    (store / "manifest.json").replace(store / growth.NEXT_MANIFEST)
    (store / "manifest.json").write_bytes(body)
    assert len(open_store(store)["train"]) == 6
    with pytest.raises(StoreError, match="is not finished"):
        open_writer(store, manifest)
    assert len(open_store(store)["train"]) == 11
    assert not (store / growth.NEXT_MANIFEST).exists()


def test_without_being_asked_nothing_grows(store: Path) -> None:
    before = counted_files(store)
    with pytest.raises(
        StoreError, match="samples of train is 6 in the store, 11 was asked; add the new ones with --append"
    ):
        open_writer(store, LARGER)
    for asked, words in (
        (make_manifest(train=11, identity={**IDENTITY, "dtype": "bfloat16"}), "identity dtype"),
        (make_manifest(make_schema(layers=("single.4", "single.5")), train=11), "contents layers"),
        (make_manifest(make_schema(layers=("single.4",)), train=11), "is not finished"),
        (make_manifest(splits={"train": ("train/000", "x", *"abcdefg")}), "data sample 1 of train"),
    ):
        with pytest.raises(StoreError, match=words):
            open_writer(store, asked, append=True)
        assert counted_files(store) == before


def test_what_was_finished_is_not_replaced_by_less(store: Path) -> None:
    """The last partition is written again, whole: its old samples must come out as they were."""
    with open_writer(store, LARGER, append=True) as writer:
        (partition, _) = writer.pending("train")
        ids = LARGER.splits["train"][4:8]
        with writer.begin(partition) as out:
            samples = [make_sample(LARGER.schema, name) for name in ids[:3]]
            out.write(0, samples, make_features(LARGER.schema, list(ids[:3])))
            out.fail(3, ids[3], "a new one may fail")
            out.commit()
        before = counted_files(store)
        with writer.begin(partition) as out:
            out.fail(0, ids[0], "cannot be read: gone")
            out.write(1, samples[1:], make_features(LARGER.schema, list(ids[1:3])))
            out.write(3, [make_sample(LARGER.schema, ids[3])], make_features(LARGER.schema, [ids[3]]))
            with pytest.raises(DataError, match=r"'train/004' was finished before and cannot be had again"):
                out.commit()
    assert counted_files(store) == before
    assert open_store(store)["train"].failed == {7: "a new one may fail"}
