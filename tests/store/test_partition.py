"""Failed samples keep their slot, wrong batches are refused whole, only complete partitions are recorded."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mmdiff_cache.errors import StoreError, StoreIncomplete
from mmdiff_cache.records import FeatureBatch, PreparedSample
from mmdiff_cache.store.partition import PartitionWriter
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.writer import StoreWriter, open_writer
from tests.store.synthetic import (
    counted_files,
    make_features,
    make_manifest,
    make_sample,
    make_schema,
    write_partition,
    write_store,
)

SCHEMA = make_schema(partition_size=3)
MANIFEST = make_manifest(SCHEMA, train=3, test=1)
IDS = list(MANIFEST.splits["train"])


@pytest.fixture
def writer(tmp_path: Path) -> StoreWriter:
    with open_writer(tmp_path / "s", MANIFEST) as writer:
        yield writer


@pytest.fixture
def partition(writer: StoreWriter) -> PartitionWriter:
    with writer.begin(writer.pending("train")[0]) as partition:
        yield partition


def batch(*numbers: int) -> tuple[list[PreparedSample], FeatureBatch]:
    ids = [IDS[n] for n in numbers]
    return [make_sample(SCHEMA, name) for name in ids], make_features(SCHEMA, ids)


def states(writer: StoreWriter) -> list[str]:
    reader = open_store(writer.path)["train"]
    return [reader.state(n) for n in range(len(reader))]


def test_a_failed_sample_keeps_its_slot_and_says_why(writer: StoreWriter, partition: PartitionWriter) -> None:
    partition.write(0, *batch(0))
    partition.fail(1, IDS[1], "cannot decode: truncated \udcff")
    partition.write(2, *batch(2))
    partition.commit()
    store = open_store(writer.path)
    reader = store["train"]
    assert states(writer) == ["done", "failed", "done"]
    assert (store.samples_done, store.samples_failed, store.samples_planned) == (2, 1, 4)
    assert reader.finished == (0, 2)
    assert reader.failed == {1: r"cannot decode: truncated \udcff"}
    np.testing.assert_array_equal(reader.hidden_states([2, 0]), batch(2, 0)[1].hidden_states[:, 0])
    for read in (reader.hidden_states, reader.images, reader.latents, reader.prompts, reader.audit):
        with pytest.raises(StoreIncomplete, match=r"'train/001' .* failed: cannot decode: truncated"):
            read([0, 1])
    assert reader.audit().shape[0] == 2
    assert writer.pending("train") == []


def test_an_unfinished_sample_is_an_error_by_name(writer: StoreWriter) -> None:
    with pytest.raises(
        StoreIncomplete, match=r"'train/002' .* was never finished; run the same extraction again"
    ):
        open_store(writer.path)["train"].read(2, 0.26, "single.4")
    assert states(writer) == ["pending"] * 3


NON_FINITE: dict[str, tuple[tuple[int, ...], float, str]] = {
    "hidden_states": ((1, 0, 1, 1, 0, 0, 3), np.nan, "hidden_states has 1 values that are not finite"),
    "latents": ((1, 0, 0, 2), np.inf, "latents has 1 values that are not finite"),
    "audit": ((1, 0, 1, 1, 6), 3, r"had 3 values that are not finite at t = 0\.26, layer single\.4"),
}


@pytest.mark.parametrize("array", NON_FINITE)
def test_a_value_that_is_not_finite_fails_its_sample_alone(
    writer: StoreWriter, partition: PartitionWriter, array: str
) -> None:
    """In what is stored, or in what the audit saw before values were clamped for the cast."""
    place, value, words = NON_FINITE[array]
    samples, features = batch(0, 1, 2)
    getattr(features, array)[place] = value
    partition.write(0, samples, features)
    partition.commit()
    assert states(writer) == ["done", "failed", "done"]
    with pytest.raises(StoreIncomplete, match=words):
        open_store(writer.path)["train"].images([1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"image": s.image[:4]}, "image must be uint8"),
        (lambda s: {"labels": {}}, "label classes is missing"),
        (lambda s: {"prompt": "a \udcff"}, "prompt is not UTF-8 text"),
        (lambda s: {"labels": {**s.labels, "depth": s.labels["classes"]}}, "label depth must be float32"),
        (lambda s: {"labels": {**s.labels, "classes": s.labels["classes"][:3]}}, "network size"),
        (lambda s: {"labels": {**s.labels, "classes": s.labels["classes"] + 9}}, "which is no class"),
        (
            lambda s: {"original_labels": {**s.original_labels, "classes": s.original_labels["classes"] + 9}},
            "which is no class and not ignored",
        ),
        (
            lambda s: {"original_labels": {**s.original_labels, "salient": np.zeros((11, 2), np.uint8)}},
            r"original label salient has \[11, 2\] pixels, the canvas holds \[10, 14\]",
        ),
    ],
)
def test_a_sample_that_does_not_fit_fails_with_the_reason(
    writer: StoreWriter, partition: PartitionWriter, change, words: str
) -> None:
    samples, features = batch(0, 1, 2)
    samples[2] = dataclasses.replace(samples[2], **change(samples[2]))
    partition.write(0, samples, features)
    partition.commit()
    with pytest.raises(StoreIncomplete, match=words):
        open_store(writer.path)["train"].latents([2])


@pytest.mark.parametrize(
    ("offset", "numbers", "words"),
    [
        (0, (1, 0), "has samples"),
        (1, (0,), "has samples"),
        (3, (0,), "has samples"),
        (-1, (2,), "has samples"),
    ],
)
def test_rows_never_belong_to_another_sample(
    partition: PartitionWriter, offset: int, numbers: tuple[int, ...], words: str
) -> None:
    with pytest.raises(StoreError, match=words):
        partition.write(offset, *batch(*numbers))


def test_a_slot_is_written_once(partition: PartitionWriter) -> None:
    partition.write(0, *batch(0))
    with pytest.raises(StoreError, match=r"'train/000' .* was already written"):
        partition.write(0, *batch(0, 1))
    with pytest.raises(StoreError, match="was already written"):
        partition.fail(0, IDS[0], "late")


def unchecked(features: FeatureBatch, **changes: object) -> FeatureBatch:
    """A batch that its constructor, checked in tests, would refuse: users' code is not checked."""
    altered = copy.copy(features)
    for name, value in changes.items():
        object.__setattr__(altered, name, value)
    return altered


@pytest.mark.parametrize(
    "change",
    [
        lambda f: {"hidden_states": f.hidden_states.astype(np.float32)},
        lambda f: {"hidden_states": f.hidden_states[:, :, :2]},
        lambda f: {"latents": f.latents[:1]},
        lambda f: {"concept_scores": {}},
        lambda f: {"concept_maps": {**f.concept_maps, "more": f.concept_maps["scenes"]}},
    ],
    ids=["another dtype", "fewer timesteps", "fewer samples", "no scores", "another vocabulary"],
)
def test_a_batch_of_other_arrays_is_refused_whole(partition: PartitionWriter, change) -> None:
    samples, features = batch(0, 1)
    with pytest.raises(StoreError, match=r"of a batch must|a batch must hold"):
        partition.write(0, samples, unchecked(features, **change(features)))
    partition.write(0, samples, features)


def test_no_record_while_a_slot_is_open(writer: StoreWriter, partition: PartitionWriter) -> None:
    partition.write(0, *batch(0, 1))
    with pytest.raises(StoreError, match="'train/002' was never written"):
        partition.commit()
    assert states(writer) == ["pending"] * 3
    partition.abort()
    assert not list((writer.path / "staging").iterdir())
    assert not list(writer.path.rglob("c.0.0.0.0.0.0.0"))


def test_a_sample_that_fails_on_the_second_try_takes_its_shard_with_it(tmp_path: Path) -> None:
    """The files left by a partition that lost its record must not outlive a redo that ends otherwise."""
    fresh, redone = tmp_path / "fresh", tmp_path / "redone"
    write_store(fresh, MANIFEST, failing=(IDS[1],))
    write_store(redone, MANIFEST)
    (redone / "partitions" / "train-000000.json").unlink()
    write_store(redone, MANIFEST, failing=(IDS[1],))
    assert counted_files(redone) == counted_files(fresh)


def test_a_partition_can_be_written_beside_the_lock_holder(tmp_path: Path) -> None:
    """A worker process gets path, manifest and partition; only the driver holds the lock."""
    path = tmp_path / "s"
    with open_writer(path, MANIFEST) as driver:
        todo = [*driver.pending("train"), *driver.pending("test")]
        for partition in todo:
            ids = list(MANIFEST.splits[partition.split][partition.start : partition.stop])
            with PartitionWriter(path, driver.manifest, partition) as worker:
                worker.write(0, [make_sample(SCHEMA, name) for name in ids], make_features(SCHEMA, ids))
                worker.commit()
        assert driver.pending("train") == driver.pending("test") == []
    with open_writer(tmp_path / "other", MANIFEST) as writer:
        for partition in todo:
            write_partition(writer, partition)
    assert counted_files(path) == counted_files(tmp_path / "other")
