"""Damage is never served: whatever happens to a file, reading what it held is an error that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmdiff_cache.errors import DamageError, StoreError
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.reader import SplitReader, open_store
from mmdiff_cache.store.records import seal
from mmdiff_cache.store.writer import open_writer
from tests.store.synthetic import IDENTITY, counted_files, make_manifest, write_store

HIDDEN = "train.zarr/hidden_states/c.1.0.0.0.0.0.0"
READS: dict[str, Callable[[SplitReader], object]] = {
    HIDDEN: lambda reader: reader.hidden_states([1]),
    "train.zarr/images/c.0.0.0.0": lambda reader: reader.images([1]),
    "train.zarr/prompt/c.0": lambda reader: reader.prompts([1]),
    "train.zarr/labels/depth/original/c.0.0.0": lambda reader: reader.original_label("depth", 1),
    "train.zarr/concepts/scenes/scores/c.0.0.0.0.0.0.0": lambda reader: reader.concept_scores("scenes", [1]),
    "train.zarr/audit/c.0.0.0.0.0": lambda reader: reader.audit([1]),
}


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x10
    path.write_bytes(data)


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "store"))


@pytest.mark.parametrize("name", READS)
def test_a_missing_cut_or_empty_shard_is_an_error(store: Path, name: str) -> None:
    file, whole, reader = store / name, (store / name).read_bytes(), open_store(store)["train"]
    for content in (None, b"", whole[:-1], whole[: len(whole) // 2], whole + b"\0"):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(DamageError, match=name.replace(".", r"\.")):
            READS[name](reader)
    file.write_bytes(whole)
    READS[name](reader)


@pytest.mark.parametrize("name", READS)
def test_a_flipped_bit_anywhere_in_what_is_read_is_an_error(store: Path, name: str) -> None:
    """Chunks and indexes have checksums; sample 1 is read, so the bytes of others may be flipped."""
    file, whole = store / name, (store / name).read_bytes()
    truth = READS[name](open_store(store)["train"])
    caught = 0
    for byte in np.linspace(0, len(whole) - 1, 25).astype(int):
        flip(file, int(byte))
        try:
            np.testing.assert_array_equal(READS[name](open_store(store)["train"]), truth)
        except DamageError:
            caught += 1
        file.write_bytes(whole)
    everything_read = name == HIDDEN or "audit" in name or "prompt" in name
    assert caught == 25 if everything_read else caught > 0


def test_damage_of_one_sample_leaves_the_others(store: Path) -> None:
    (store / HIDDEN).unlink()
    reader = open_store(store)["train"]
    assert reader.hidden_states([0, 2, 3, 4, 5]).shape[0] == 5
    with pytest.raises(DamageError):
        reader.hidden_states([0, 1])


@pytest.mark.parametrize(
    "name", ["train.zarr/hidden_states/zarr.json", "train.zarr/zarr.json", "test.zarr/timestep/c.0"]
)
def test_changed_metadata_is_found_on_opening(store: Path, manifest: Manifest, name: str) -> None:
    flip(store / name, 7)
    with pytest.raises(DamageError, match=name.replace(".", r"\.")):
        open_store(store)
    with pytest.raises(DamageError, match=name.replace(".", r"\.")):
        open_writer(store, manifest)
    (store / name).unlink()
    with pytest.raises(DamageError, match="is missing"):
        open_store(store)


def test_a_changed_manifest_is_found(store: Path) -> None:
    file = store / "manifest.json"
    whole = file.read_bytes()
    for byte in np.linspace(0, len(whole) - 2, 40).astype(int):
        flip(file, int(byte))
        with pytest.raises(StoreError):
            open_store(store)
        file.write_bytes(whole)
    file.write_bytes(whole.replace(b'"train/000"', b'"train/00x"'))
    with pytest.raises(DamageError, match="does not match its own sha256"):
        open_store(store)


def test_a_manifest_cannot_point_outside(store: Path) -> None:
    body = json.loads((store / "manifest.json").read_bytes())
    del body["sha256"]
    body["metadata"]["../outside"] = "0" * 64
    (store / "manifest.json").write_bytes(seal(body))
    with pytest.raises(DamageError, match="outside"):
        open_store(store)


def test_an_unusable_record_makes_its_samples_unreadable_and_is_redone(
    store: Path, finished: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    record = store / "partitions" / "train-000000.json"
    whole = record.read_bytes()
    other = (store / "partitions" / "train-000001.json").read_bytes()
    for content in (b"", whole[:100], b"[]", whole.replace(b"done", b"d0ne", 1), other):
        record.write_bytes(content)
        reader = open_store(store)["train"]
        assert [reader.state(n) for n in range(6)] == ["damaged"] * 4 + ["done"] * 2
        with pytest.raises(DamageError, match=r"'train/002' .* cannot be trusted"):
            reader.read(2, 0.26, "single.4")
        assert reader.read(4, 0.26, "single.4").shape == (2, 3, 8)
    write_store(store, manifest)
    assert "train-000000 will be written again" in caplog.text
    assert counted_files(store) == counted_files(finished)


@pytest.mark.parametrize("name", [HIDDEN, "train.zarr/prompt/c.0"])
def test_a_lost_or_cut_shard_is_redone_by_the_same_run(
    store: Path, finished: Path, manifest: Manifest, name: str
) -> None:
    for action in (lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:-3])):
        action(store / name)
        with open_writer(store, manifest) as writer:
            assert [p.name for p in writer.pending("train")] == ["train-000000"]
            assert writer.pending("test") == []
        write_store(store, manifest)
        assert counted_files(store) == counted_files(finished)


def test_a_record_of_another_identity_is_not_believed(
    store: Path, manifest: Manifest, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write_store(other, make_manifest(identity={**IDENTITY, "dtype": "bfloat16"}))
    shutil.copy(other / "partitions/train-000000.json", store / "partitions/train-000000.json")
    reader = open_store(store)["train"]
    assert reader.state(0) == "damaged"
    with pytest.raises(DamageError, match="another identity"):
        reader.hidden_states([0])


def test_a_record_with_one_field_more_is_still_read(store: Path) -> None:
    """A later release may add fields; a record without one that is needed is refused."""
    path = store / "partitions" / "train-000001.json"
    body = json.loads(path.read_bytes())
    del body["sha256"]
    path.write_bytes(seal({**body, "note": "added later"}))
    assert open_store(store)["train"].state(5) == "done"
    del body["files"]
    path.write_bytes(seal(body))
    assert open_store(store)["train"].state(5) == "damaged"
