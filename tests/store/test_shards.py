"""Shards written as a stream and read chunk by chunk are Zarr's, to the bit, in bounded memory."""

import json
import os
import shutil
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff_cache.errors import DamageError
from mmdiff_cache.store import shards
from mmdiff_cache.store.files import sha256_file
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.shard_writer import AHEAD, write_shard
from mmdiff_cache.store.shards import (
    EMPTY,
    ShardLayout,
    decode_chunk,
    decode_index,
    encode_chunk,
    encode_index,
    parse_layout,
)
from mmdiff_cache.store.split import SplitReader

LAYOUT = ShardLayout(
    dtype=np.dtype("float16"),
    shard=(1, 2, 3, 4, 5),
    chunk=(1, 1, 1, 4, 5),
    compressor="zstd",
    level=1,
    shuffle=1,
    block=262144,
)
VALUES = np.random.default_rng(0).standard_normal(LAYOUT.shard).astype(np.float16)


def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    entries = []
    for threads in (1, 2, 5):
        with ThreadPoolExecutor(threads) as pool:
            entries.append(write_shard(tmp_path, f"{threads}", LAYOUT, VALUES, pool))
    contents = {(tmp_path / entry.path).read_bytes() for entry in entries}
    assert len(contents) == 1
    for entry in entries:
        assert entry.size == (tmp_path / entry.path).stat().st_size
        assert entry.sha256 == sha256_file(tmp_path / entry.path)


def test_a_shard_of_fill_is_written_all_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        entry = write_shard(tmp_path, "c", LAYOUT, np.full_like(VALUES, np.nan), pool)
    data = (tmp_path / "c").read_bytes()
    places = decode_index(LAYOUT, data[-LAYOUT.index_bytes :], entry.size)
    assert (places != EMPTY).all()
    out = np.zeros(LAYOUT.chunk, np.float16)
    offset, length = map(int, places[5])
    decode_chunk(LAYOUT, data[offset : offset + length], out)
    assert np.isnan(out).all()


class Counting(Executor):
    """Runs a task when its result is asked for, and counts how many results are held at once."""

    def __init__(self) -> None:
        self.waiting = self.most = 0

    def submit(self, fn, /, *arguments, **keywords):
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        future: Future[object] = Future()
        future.set_result(fn(*arguments, **keywords))
        result = future.result

        def taken(timeout: float | None = None) -> object:
            self.waiting -= 1
            return result(timeout)

        future.result = taken  # type: ignore[method-assign]
        return future


def test_only_a_few_encoded_chunks_wait(tmp_path: Path) -> None:
    pool = Counting()
    layout = ShardLayout(**{**{f: getattr(LAYOUT, f) for f in LAYOUT.__slots__}, "shard": (1, 20, 3, 4, 5)})
    write_shard(tmp_path, "c", layout, np.zeros(layout.shard, np.float16), pool)
    assert pool.waiting == 0
    assert pool.most == AHEAD + 1


@given(
    values=st.lists(st.floats(width=16, allow_nan=False), min_size=20, max_size=20),
    compressor=st.sampled_from(("zstd", "lz4")),
)
@settings(deadline=None)
def test_every_chunk_comes_back(values: list[float], compressor: str) -> None:
    layout = ShardLayout(**{**{f: getattr(LAYOUT, f) for f in LAYOUT.__slots__}, "compressor": compressor})
    chunk = np.array(values, np.float16).reshape(layout.chunk)
    out = np.empty_like(chunk)
    decode_chunk(layout, encode_chunk(layout, chunk), out)
    np.testing.assert_array_equal(out.view(np.uint16), chunk.view(np.uint16))


def test_every_flipped_byte_of_a_chunk_or_an_index_is_noticed() -> None:
    chunk = encode_chunk(LAYOUT, VALUES[:, :1, :1])
    out = np.empty(LAYOUT.chunk, np.float16)
    index = encode_index(np.array([[0, 5]] * 6, np.uint64))
    for data, decode in (
        (chunk, lambda changed: decode_chunk(LAYOUT, changed, out)),
        (index, lambda changed: decode_index(LAYOUT, changed, 5 + len(index))),
    ):
        decode(data)
        for at in range(len(data)):
            changed = bytearray(data)
            changed[at] ^= 1
            with pytest.raises(ValueError, match=r"checksum|size"):
                decode(bytes(changed))
        for length in range(len(data)):
            with pytest.raises(ValueError, match=r"checksum|size"):
                decode(data[:length])


@pytest.mark.parametrize("place", [(6, 0), (0, 6), (5, 1), (2**63, 2**63), (EMPTY, 3), (3, EMPTY)])
def test_an_index_that_points_outside_is_refused(place: tuple[int, int]) -> None:
    index = encode_index(np.array([place, *[(0, 5)] * 5], np.uint64))
    with pytest.raises(ValueError, match="outside of the file"):
        decode_index(LAYOUT, index, 5 + len(index))


def test_a_chunk_with_a_header_that_lies_is_refused() -> None:
    packed = bytearray(encode_chunk(LAYOUT, VALUES[:, :1, :1])[:-4])
    packed[4:8] = (2**31 - 1).to_bytes(4, "little")  # bytes of the decoded chunk, says Blosc's header
    lying = bytes(packed) + shards._checksum(bytes(packed))
    with pytest.raises(ValueError, match="size"):
        decode_chunk(LAYOUT, lying, np.empty(LAYOUT.chunk, np.float16))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["codecs"][0]["configuration"].update(index_location="start"),
        lambda c: c["codecs"][0]["configuration"]["codecs"].pop(),
        lambda c: c["codecs"][0]["configuration"]["codecs"][1].update(name="gzip"),
        lambda c: c["codecs"][0]["configuration"]["codecs"][0]["configuration"].update(endian="big"),
        lambda c: c["codecs"].append({"name": "crc32c"}),
        lambda c: c.update(storage_transformers=["any"]),
        lambda c: c.update(data_type="int7"),
        lambda c: c.pop("codecs"),
    ],
    ids=[
        "index first",
        "no checksum",
        "another codec",
        "big endian",
        "a second codec",
        "transformers",
        "another type",
        "no codecs",
    ],
)
def test_what_is_not_known_is_left_to_zarr(finished: Path, change) -> None:
    stated = json.loads((finished / "train.zarr/hidden_states/zarr.json").read_bytes())
    assert parse_layout(json.dumps(stated).encode()) is not None
    change(stated)
    assert parse_layout(json.dumps(stated).encode()) is None


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
    monkeypatch.setattr(SplitReader, "_layout", lambda self, path: None)
    monkeypatch.setattr(zarr, "open_array", lambda path, **how: opened.append(str(path)) or real(path, **how))
    through_zarr = everything(open_store(finished)["train"])
    assert len(opened) >= 7, "this reader does go through zarr"
    for one, other in zip(direct, through_zarr, strict=True):
        np.testing.assert_array_equal(one, other)


def test_targets_that_are_not_contiguous_are_filled(finished: Path) -> None:
    reader = open_store(finished)["train"]
    wanted = reader.hidden_states([0, 1])
    room = np.zeros((*wanted.shape[:-1], 2 * wanted.shape[-1]), np.float16)
    np.testing.assert_array_equal(reader.hidden_states([0, 1], out=room[..., ::2]), wanted)
    assert not room[..., 1::2].any()


def test_a_damaged_chunk_names_its_file_and_leaves_no_file_open(finished: Path, tmp_path: Path) -> None:

    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
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
