"""Whatever is changed in a store, verify finds it and names it; what is only unfinished is no damage."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from mmdiff_cache.errors import StoreError
from mmdiff_cache.store.files import sha256_file
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.records import FileEntry, encode_record, read_record, record_path
from mmdiff_cache.store.verify import verify
from mmdiff_cache.store.writer import open_writer
from tests.store.synthetic import counted_files, make_manifest, write_partition, write_store


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def flip(file: Path, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 4
    file.write_bytes(data)


def test_a_sound_store_is_sound_and_untouched(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    seen: list[tuple[int, int, str]] = []
    found = verify(finished, progress=lambda *call: seen.append(call))
    assert found.sound, str(found)
    assert (found.samples, found.failed, found.pending) == (9, 0, 0)
    assert found.bytes == open_store(finished).disk_bytes
    assert "sound" in str(found)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert {state for _, _, state in seen} == {
        "files", "values of train-000000", "values of train-000001", "values of test-000000"
    }  # fmt: skip


def test_a_flipped_bit_in_any_shard_is_found_there(copy: Path) -> None:
    shards = [name for name in counted_files(copy) if "/c." in name]
    for name in shards:
        flip(copy / name, (copy / name).stat().st_size // 2)
    found = [str(finding) for finding in verify(copy).findings]
    assert len(shards) > 50
    for name in shards:
        assert any(name in finding for finding in found), name


def test_a_flipped_bit_in_any_other_file_is_found_there(copy: Path) -> None:
    for name in sorted(name for name in counted_files(copy) if "/c." not in name):
        file = copy / name
        whole = file.read_bytes()
        flip(file, len(whole) // 2)
        found = verify(copy)
        assert not found.sound, name
        assert any(name in str(finding) for finding in found.findings), f"{name}: {found}"
        file.write_bytes(whole)
    assert verify(copy).sound


@pytest.mark.parametrize("harm", ["cut", "emptied", "deleted"])
@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "partitions/train-000001.json",
        "train.zarr/hidden_states/zarr.json",
        "train.zarr/hidden_states/c.5.1.0.0.0.0.0",
        "test.zarr/labels/depth/original/c.0.0.0",
    ],
)
def test_files_that_were_cut_emptied_or_deleted(copy: Path, name: str, harm: str) -> None:
    file = copy / name
    data = file.read_bytes()
    file.unlink() if harm == "deleted" else file.write_bytes(data[: len(data) // 2] if harm == "cut" else b"")
    if (name, harm) == ("manifest.json", "deleted"):
        with pytest.raises(StoreError, match="is not a store"):
            verify(copy)
    elif (name, harm) == ("partitions/train-000001.json", "deleted"):
        found = verify(copy)
        assert found.sound
        assert found.pending == 2
    else:
        assert any(name in str(finding) for finding in verify(copy).findings)


def test_unfinished_and_failed_samples_are_counted_not_blamed(tmp_path: Path, manifest: Manifest) -> None:
    with open_writer(tmp_path / "s", manifest) as writer:
        write_partition(writer, writer.pending("train")[0], failing=("train/001",))
    found = verify(tmp_path / "s")
    assert found.sound
    assert (found.samples, found.failed, found.pending) == (3, 1, 5)


def test_a_limit_looks_at_the_first_samples_of_every_split(copy: Path) -> None:
    flip(copy / "train.zarr/hidden_states/c.3.0.0.0.0.0.0", 30)
    quick = verify(copy, limit=2)
    assert quick.sound
    assert quick.samples == 4
    assert not verify(copy, limit=4).sound


def rewrite(store: Path, array: str, position: object, values: object, manifest: Manifest) -> None:
    """Change stored values behind the checksums' back: files, then the record, as a faulty writer would."""
    zarr.open_array(store / "train.zarr" / array, mode="r+")[position] = values

    partition = manifest.partitions("train")[0]
    record = read_record(store, partition, manifest.fingerprint, manifest.splits["train"][:4])
    assert record is not None
    files = tuple(
        FileEntry(path=e.path, size=(store / e.path).stat().st_size, sha256=sha256_file(store / e.path))
        for e in record.files
    )

    (store / record_path(partition)).write_bytes(encode_record(replace(record, files=files)))


@pytest.mark.parametrize(
    ("array", "position", "values", "words"),
    [
        ("hidden_states", (1, 0, 2, 1), 7.0, "double|single.4 at t=0.001, variant 0: its largest value is 7"),
        ("hidden_states", (1, 1, 0, 0, 0, 0, 0), np.nan, "variant 1: has values that are not finite"),
        ("hidden_states", (1, 0, 0, 0), 0.0, "its largest value is 0"),
        ("latents", (2, 0, 0, 0), np.inf, "its latent has values that are not finite"),
        ("concepts/depth/scores", (0, 1, 2, 0, 1, 0, 0), np.nan, "concept scores of depth"),
        ("concepts/scenes/maps", (3, 0, 0), 0.9, "concept maps of scenes do not add up to 1"),
        ("labels/classes/map", (0, 3, 3), 3, "label classes has the value 3, which is no class"),
        ("labels/salient/original", (1, 0, 0), 2, "label salient has the value 2"),
        ("sample_id", 2, "train/000", "its row belongs to 'train/000'"),
        ("noise_key", (3, 1, 0), 5, "its noise key is not that of its id"),
    ],
    ids=range(10),
)
def test_values_that_are_wrong_under_right_checksums(
    copy: Path, manifest: Manifest, array: str, position: object, values: object, words: str
) -> None:
    rewrite(copy, array, position, values, manifest)
    found = verify(copy)
    assert len(found.findings) == 1, str(found)
    assert any(word in str(found.findings[0]) for word in words.split("|"))
    assert "of train" in found.findings[0].where


def test_rows_of_another_sample_are_noticed(copy: Path, manifest: Manifest) -> None:
    """Two samples whose features were swapped, checksums and all."""
    array = zarr.open_array(copy / "train.zarr/hidden_states", mode="r")
    rewrite(copy, "hidden_states", 0, array[1], manifest)
    assert "was stored in the audit" in str(verify(copy))


def test_a_record_of_another_store_is_found(copy: Path, tmp_path: Path, manifest: Manifest) -> None:
    other = tmp_path / "other"
    identity = {**manifest.identity, "dtype": "bfloat16"}
    write_store(other, make_manifest(identity=identity))
    shutil.copy(other / "partitions/train-000000.json", copy / "partitions/train-000000.json")
    assert "another identity" in str(verify(copy))


def test_a_store_that_cannot_be_written_can_be_verified(copy: Path) -> None:
    folders = [copy, *(path for path in copy.rglob("*") if path.is_dir())]
    for folder in folders:
        os.chmod(folder, 0o555)
    try:
        assert verify(copy).sound
    finally:
        for folder in folders:
            os.chmod(folder, 0o755)
