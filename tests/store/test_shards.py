"""Shards written as a stream are Zarr's, to the bit, whatever the threads, in bounded memory."""

import json
import tracemalloc
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff_cache.config import Codec
from mmdiff_cache.store import shards
from mmdiff_cache.store.files import sha256_file
from mmdiff_cache.store.metadata import split_files
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
from tests.store.synthetic import make_manifest, make_schema

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


def sized(**changes: object) -> ShardLayout:
    return replace(LAYOUT, **changes)  # type: ignore[arg-type]


def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    entries = []
    for threads in (1, 2, 4):
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
    layout = sized(shard=(1, 20, 3, 4, 5))
    write_shard(tmp_path, "c", layout, np.zeros(layout.shard, np.float16), pool)
    assert pool.waiting == 0
    assert pool.most == AHEAD


def test_a_writer_costs_less_than_64_mib_at_the_size_of_flux(tmp_path: Path) -> None:
    """Random bits: nothing shrinks, so a chunk is as large encoded as before, 6.29 MB."""
    layout = sized(shard=(1, 6, 1, 32, 32 * 3072), chunk=(1, 1, 1, 32, 32 * 3072))
    one = np.random.default_rng(0).integers(0, 2**16, layout.chunk, np.uint16).view(np.float16)
    values = np.broadcast_to(one, layout.shard)
    with ThreadPoolExecutor(8) as pool:
        tracemalloc.start()
        entry = write_shard(tmp_path, "c", layout, values, pool)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert entry.size > values.nbytes
    assert peak < 64 * 1024**2
    assert (2 * AHEAD + 1) * layout.chunk_bytes < 64 * 1024**2, "the worst case: all in the making at once"


@given(
    values=st.lists(st.floats(width=16, allow_nan=False), min_size=20, max_size=20),
    compressor=st.sampled_from(("zstd", "lz4")),
)
@settings(deadline=None)
def test_every_chunk_comes_back(values: list[float], compressor: str) -> None:
    layout = sized(compressor=compressor)
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


@pytest.mark.parametrize("codec", ["zstd", "fast"])
def test_other_zarr_readers_see_the_very_bits(tmp_path: Path, codec: Codec) -> None:
    """Every bit pattern of float16, NaNs too, through the streamed shard."""
    plan = make_manifest(make_schema(codec=codec), splits={"train": ("a",)})
    for name, content in split_files(plan, "train").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    array = tmp_path / "train.zarr/hidden_states"
    layout = parse_layout((array / "zarr.json").read_bytes())
    assert layout is not None
    bits = np.random.default_rng(1).integers(0, 2**16, layout.shard, np.uint16)
    with ThreadPoolExecutor(2) as pool:
        write_shard(array, "c.0.0.0.0.0.0.0", layout, bits.view(np.float16), pool)
    plain = np.asarray(zarr.open_array(array, mode="r")[0, 0])
    np.testing.assert_array_equal(plain.view(np.uint16), bits[0, 0])
    kvstore = {"driver": "file", "path": str(array)}
    opened = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
    np.testing.assert_array_equal(opened[0, 0].read().result().view(np.uint16), bits[0, 0])
