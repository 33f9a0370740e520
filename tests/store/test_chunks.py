"""Chunks read straight out of shards: what zarr reads, or an error naming the file; never a wrong value."""

import os
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec, ZstdCodec

from mmdiff_cache.errors import ConfigError, DamageError
from mmdiff_cache.store import chunks
from mmdiff_cache.store.files import sha256_file
from mmdiff_cache.store.manifest import Manifest, encode_manifest, read_manifest
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.records import encode_record, read_record, record_path
from mmdiff_cache.store.shards import EMPTY, ShardLayout, decode_index, encode_index, parse_layout
from mmdiff_cache.store.split import SplitReader
from mmdiff_cache.store.split_arrays import SplitArrays
from tests.store.synthetic import make_features, make_manifest, make_schema, write_store

SHARD = "train.zarr/hidden_states/c.1.1.0.0.0.0.0"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_zarr_and_chunks_read_the_same(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(reader: SplitReader) -> list[np.ndarray]:
        some = [4, 0, 5]
        return [
            reader.hidden_states(some, [0.001, 0.9], ["single.4"], variant=1),
            reader.concept_scores("scenes", some, [0.26]),
            reader.concept_maps("scenes", some, variant=1),
            reader.latents(some),
            reader.images(some),
            reader.labels("depth", some),
            reader.original_label("classes", 3),
        ]

    direct = everything(open_store(finished)["train"])
    opened: list[str] = []
    real = zarr.open_array
    monkeypatch.setattr(SplitArrays, "_layout", lambda self, path: None)
    monkeypatch.setattr(zarr, "open_array", lambda path, **how: opened.append(str(path)) or real(path, **how))
    through_zarr = everything(open_store(finished)["train"])
    assert len(opened) >= 7, "this reader does go through zarr"
    for one, other in zip(direct, through_zarr, strict=True):
        np.testing.assert_array_equal(one, other)


def put(file: Path, data: bytes) -> None:
    """Another file takes the name, as a writer's rename does it."""
    aside = file.with_name("aside")
    aside.write_bytes(data)
    aside.replace(file)


def test_a_shard_that_is_written_anew_is_read_by_its_new_index(copy: Path) -> None:
    """The order of chunks is free: two of them change places, and all of them have the same length."""
    reader, file = open_store(copy)["train"], copy / SHARD
    truth = reader.hidden_states([1], variant=1)
    layout = parse_layout((file.parent / "zarr.json").read_bytes())
    assert layout is not None
    data = file.read_bytes()
    places = decode_index(layout, data[-layout.index_bytes :], len(data)).copy()
    assert len(set(places[:, 1])) == 1
    first, last = (data[offset : offset + length] for offset, length in places[[0, -1]].tolist())
    size = len(first)
    places[[0, -1]] = places[[-1, 0]]
    put(file, last + data[size : -size - layout.index_bytes] + first + encode_index(places))
    np.testing.assert_array_equal(reader.hidden_states([1], variant=1), truth)


def test_every_flipped_byte_of_a_shard_is_an_error_or_not_read(copy: Path, manifest: Manifest) -> None:
    """The whole shard: any flip is an error. One map of it: an error, or the true value."""
    file, whole = copy / SHARD, (copy / SHARD).read_bytes()
    truth = make_features(manifest.schema, ["train/001"]).hidden_states[0, 1]
    served = 0
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        put(file, data)
        reader = SplitReader(copy, manifest, "train")
        with pytest.raises(DamageError, match="is damaged"):
            reader.hidden_states([1], variant=1)
        try:
            value = reader.read(1, 0.26, "single.4", variant=1)
        except DamageError:
            continue
        served += 1
        np.testing.assert_array_equal(value, truth[1, 1])
    index = 6 * 16 + 4
    assert served == (len(whole) - index) * 5 // 6, "the other five maps do not disturb this one"


def test_a_shard_that_marks_a_chunk_as_never_written_is_damaged(copy: Path) -> None:
    """Zarr would answer with its fill value."""
    file = copy / SHARD
    data = file.read_bytes()
    places = np.frombuffer(data[-100:-4], "<u8").reshape(-1, 2).copy()
    places[3] = EMPTY
    put(file, data[:-100] + encode_index(places))
    reader = open_store(copy)["train"]
    with pytest.raises(DamageError, match=r"c\.1\.1.* lacks chunk 3"):
        reader.hidden_states([0, 1], variant=1)
    assert reader.read(1, 0.9, "double.1", variant=1).shape == (2, 3, 8)


some = st.lists(st.integers(0, 5), max_size=5)


@given(samples=some, steps=st.lists(st.sampled_from((0.9, 0.26, 0.001)), max_size=4), both=st.booleans())
@settings(deadline=None, max_examples=25)
def test_any_selection_is_what_plain_zarr_reads(
    finished: Path, samples: list[int], steps: list[float], both: bool
) -> None:
    """Any order, also twice the same, also none."""
    layers = ["single.4", "double.1"] if both else ["single.4"]
    read = open_store(finished)["train"].hidden_states(samples, steps, layers, variant=1)
    plain = zarr.open_array(finished / "train.zarr/hidden_states", mode="r")[:, 1]
    wanted = plain[samples][:, [(0.9, 0.26, 0.001).index(t) for t in steps]]
    np.testing.assert_array_equal(read, wanted[:, :, [1, 0] if both else [1]])


def test_other_codecs_are_read_by_zarr_with_the_same_checks(tmp_path: Path) -> None:
    """Hidden states in plain zstd come through zarr; a file that is cut, changed or missing is damage."""
    plan = make_manifest(make_schema(partition_size=2), train=2, test=1)
    write_store(tmp_path / "s", plan)
    rewrite_with_zstd(tmp_path / "s", "train")
    store = open_store(tmp_path / "s")
    reader = store["train"]
    truth = make_features(plan.schema, list(reader.ids)).hidden_states[:, 1]
    np.testing.assert_array_equal(reader.hidden_states([1, 0], variant=1), truth[[1, 0]])
    assert "blosc" not in reader.codec("hidden_states")
    file = tmp_path / "s" / SHARD
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:-9] + b"?" + whole[-8:], None):
        put(file, content) if content is not None else file.unlink()
        with pytest.raises(DamageError, match=r"c\.1\.1"):
            reader.hidden_states([1], variant=1)


def rewrite_with_zstd(root: Path, split: str) -> None:
    """Hidden states in another codec, by zarr alone; manifest and record tell the truth about it."""
    folder = root / f"{split}.zarr/hidden_states"
    old = zarr.open_array(folder, mode="r")
    values = old[:]
    shutil.rmtree(folder)
    array = zarr.create_array(
        folder,
        shape=old.shape,
        dtype=old.dtype,
        chunks=old.chunks,
        shards=old.shards,
        compressors=[ZstdCodec(), Crc32cCodec()],
        fill_value=old.fill_value,
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    array[:] = values
    stored = read_manifest(root)
    name = f"{split}.zarr/hidden_states/zarr.json"
    hashes = {**stored.metadata, name: sha256_file(root / name)}
    (root / "manifest.json").write_bytes(encode_manifest(replace(stored, metadata=hashes)))
    for partition in stored.partitions(split):
        ids = stored.splits[split][partition.start : partition.stop]
        record = read_record(root, partition, stored.fingerprint, ids)
        assert record is not None
        files = tuple(
            replace(entry, size=(root / entry.path).stat().st_size, sha256=sha256_file(root / entry.path))
            for entry in record.files
        )
        (root / record_path(partition)).write_bytes(encode_record(replace(record, files=files)))


def test_a_read_only_target_is_refused(finished: Path) -> None:
    out = np.zeros((1, 3, 2, 2, 3, 8), np.float16)
    out.flags.writeable = False
    with pytest.raises(ConfigError, match="read-only"):
        open_store(finished)["train"].hidden_states([0], out=out)
    assert not out.any()


def test_indexes_are_kept_up_to_a_limit(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "INDEX_BYTES", 2 * 6 * 16)
    reader = open_store(finished)["train"]
    reader.hidden_states(range(6))
    kept = list(reader._arrays._chunks._indexes)  # which, is a matter of the threads that read them
    assert len(kept) == 2
    assert set(kept) <= {f"train.zarr/hidden_states/c.{n}.0.0.0.0.0.0" for n in range(6)}


def test_after_an_error_nobody_writes_into_the_target(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waited is dropped, what ran has ended: the caller may use the memory again."""
    (copy / "train.zarr/hidden_states/c.0.0.0.0.0.0.0").unlink()
    reader = open_store(copy)["train"]
    out = np.zeros((6, 3, 2, 2, 3, 8), np.float16)

    def slowly(layout: ShardLayout, data: bytes, target: np.ndarray) -> None:
        time.sleep(0.02)
        target[...] = 1

    monkeypatch.setattr(chunks, "decode_chunk", slowly)
    with pytest.raises(DamageError, match="missing"):
        reader.hidden_states([5, 4, 3, 2, 1, 0], out=out)
    written = out.any(axis=(1, 2, 3, 4, 5)).sum()
    out[:] = 0
    time.sleep(0.2)
    assert not out.any()
    assert written < 5


def test_a_reader_can_be_pickled(finished: Path) -> None:
    reader = open_store(finished)["train"]
    wanted = reader.hidden_states([2])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader)).hidden_states([2]), wanted)


def test_targets_that_are_not_contiguous_are_filled(finished: Path) -> None:
    reader = open_store(finished)["train"]
    wanted = reader.hidden_states([0, 1])
    room = np.zeros((*wanted.shape[:-1], 2 * wanted.shape[-1]), np.float16)
    np.testing.assert_array_equal(reader.hidden_states([0, 1], out=room[..., ::2]), wanted)
    assert not room[..., 1::2].any()


def test_a_damaged_chunk_names_its_file_and_leaves_no_file_open(copy: Path) -> None:
    name = "c.2.0.0.0.0.0.0"
    file = copy / "train.zarr/hidden_states" / name
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    reader = open_store(copy)["train"]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(DamageError, match=name):
            reader.hidden_states(range(6))
    assert len(os.listdir("/proc/self/fd")) == before
    assert reader.hidden_states([0, 1, 3]).shape[0] == 3


def test_a_forked_process_reads_with_threads_of_its_own(finished: Path) -> None:
    reader = open_store(finished)["train"]
    wanted = reader.hidden_states([0])
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(reader.hidden_states([0]), wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
