"""docs/cache-format.md is enough: values and noise recomputed from its words, without our code or zarr's."""

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numcodecs
import numpy as np

from mmdiff_cache.records import draw_noise
from mmdiff_cache.store.manifest import Manifest
from tests.store.synthetic import make_features

MASK = 2**64 - 1
TAIL = 3.6541528853610088


def read_chunk(shard: bytes, counts: tuple[int, ...], place: tuple[int, ...]) -> bytes:
    """One inner chunk, decoded: index at the end, C order, offset and length as little-endian uint64."""
    entries = math.prod(counts)
    index, crc = shard[-16 * entries - 4 : -4], shard[-4:]
    assert google_crc32c.value(index) == struct.unpack("<I", crc)[0]
    offset, length = struct.unpack_from("<QQ", index, 16 * int(np.ravel_multi_index(place, counts)))
    assert (offset, length) != (MASK, MASK)
    data, crc = shard[offset : offset + length - 4], shard[offset + length - 4 : offset + length]
    assert google_crc32c.value(data) == struct.unpack("<I", crc)[0]
    return numcodecs.Blosc().decode(data)


def test_a_map_can_be_read_by_hand(finished: Path, manifest: Manifest) -> None:
    shard = (finished / "train.zarr/hidden_states/c.5.1.0.0.0.0.0").read_bytes()
    truth = make_features(manifest.schema, ["train/005"]).hidden_states[0, 1]
    for t in range(3):
        for layer in range(2):
            data = read_chunk(shard, (1, 1, 3, 2, 1, 1, 1), (0, 0, t, layer, 0, 0, 0))
            np.testing.assert_array_equal(np.frombuffer(data, "<f2").reshape(2, 3, 8), truth[t, layer])


def test_a_short_partition_can_be_read_by_hand(finished: Path, manifest: Manifest) -> None:
    """Sample 5 is the second of the partition of samples 4 and 5; the two slots behind it have no chunk."""
    shard = (finished / "train.zarr/latents/c.1.0.0.0").read_bytes()
    data = read_chunk(shard, (4, 1, 1, 1), (1, 0, 0, 0))
    truth = make_features(manifest.schema, ["train/005"]).latents[0]
    np.testing.assert_array_equal(np.frombuffer(data, "<f4").reshape(2, 3, 4), truth)
    index = np.frombuffer(shard[-68:-4], "<u8").reshape(4, 2)
    assert (index[2:] == MASK).all()


def test_text_can_be_read_by_hand(finished: Path) -> None:
    shard = (finished / "test.zarr/sample_id/c.0").read_bytes()
    offset, length = struct.unpack_from("<QQ", shard, len(shard) - 20)
    chunk, position, texts = shard[offset : offset + length - 4], 4, []
    for _ in range(struct.unpack_from("<I", chunk)[0]):
        (size,) = struct.unpack_from("<I", chunk, position)
        texts.append(chunk[position + 4 : position + 4 + size].decode())
        position += 4 + size
    assert texts == ["test/é0", "test/é1", "test/é2", ""]


def test_documents_are_sealed_as_said(finished: Path) -> None:
    documents = [finished / "manifest.json", *sorted((finished / "partitions").iterdir())]
    for path in documents:
        body = json.loads(path.read_text(encoding="utf-8"))
        stated = body.pop("sha256")
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert hashlib.sha256(text.encode()).hexdigest() == stated
    manifest = json.loads(documents[0].read_text(encoding="utf-8"))
    for path, stated in manifest["metadata"].items():
        assert hashlib.sha256((finished / path).read_bytes()).hexdigest() == stated
    for record in documents[1:]:
        body = json.loads(record.read_text(encoding="utf-8"))
        assert body["identity"] == manifest["fingerprint"]
        for entry in body["files"]:
            data = (finished / entry["path"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size"], entry["sha256"])


def philox(key: tuple[int, int]) -> Iterator[int]:
    """Philox4x64-10 as the 64-bit words that numpy takes from it."""
    counter = 0
    while True:
        counter += 1
        c, k = [counter & MASK, 0, 0, 0], key
        for turn in range(10):
            if turn:
                k = ((k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK)
            a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(b >> 64) ^ c[1] ^ k[0], b & MASK, (a >> 64) ^ c[3] ^ k[1], a & MASK]
        yield from c


def halves(key: tuple[int, int]) -> Iterator[int]:
    for word in philox(key):
        yield word & 0xFFFFFFFF
        yield word >> 32


def tables() -> tuple[list[int], list[np.float32], list[np.float32]]:
    """Limits k, widths w and heights f of the 256 layers."""
    area = TAIL * math.exp(-(TAIL**2) / 2) + math.sqrt(math.pi / 2) * math.erfc(TAIL / math.sqrt(2))
    edge = [0.0] * 255 + [TAIL]
    for i in range(254, 0, -1):
        edge[i] = math.sqrt(-2 * math.log(area / edge[i + 1] + math.exp(-(edge[i + 1] ** 2) / 2)))
    base = area / math.exp(-(TAIL**2) / 2)
    limits = [int(TAIL / base * 2**23), *(int(edge[i - 1] / edge[i] * 2**23) for i in range(1, 256))]
    widths = [np.float32(x / 2**23) for x in (base, *edge[1:])]
    return limits, widths, [np.float32(math.exp(-(x**2) / 2)) for x in edge]


def normals(key: tuple[int, int], count: int) -> list[np.float32]:
    limits, widths, heights = tables()
    bits, out = halves(key), []
    one = np.float32(1)

    def uniform() -> np.float32:
        return np.float32(next(bits) >> 8) * np.float32(2**-24)

    while len(out) < count:
        word = next(bits)
        layer, negative, size = word & 0xFF, (word >> 8) & 1, (word >> 9) & 0x7FFFFF
        x = np.float32(size) * widths[layer] * (-one if negative else one)
        if size < limits[layer]:
            out.append(x)
        elif layer == 0:
            beyond, other = np.float32(0), np.float32(0)
            while not 2 * other > beyond * beyond:
                beyond = -np.log1p(-uniform()) / np.float32(TAIL)
                other = -np.log1p(-uniform())
            out.append((np.float32(TAIL) + beyond) * (-one if (size >> 8) & 1 else one))
        elif (heights[layer - 1] - heights[layer]) * uniform() + heights[layer] < math.exp(
            -(float(x) ** 2) / 2
        ):
            out.append(x)
    return out


def test_noise_can_be_drawn_by_hand() -> None:
    """Equal to the last bit, but for the tail beyond 3.654, where the logarithm's last bit may differ."""
    digest = hashlib.sha256(b"mmdiff-cache noise 1\x000\x00a\x000").digest()
    key = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little"))
    assert key == (0x08718D54168DFF6C, 0x60972D08FA9B73D5)
    words = philox(key)
    assert [next(words) for _ in range(2)] == [15602610346702636383, 9777476903535204880]
    drawn = np.array(normals(key, 6000), np.float32)
    truth = draw_noise(0, "a", 0, (4, 30, 50)).ravel()
    inside = np.abs(truth) < TAIL
    assert inside.sum() > 5990
    np.testing.assert_array_equal(drawn[inside], truth[inside])
    np.testing.assert_allclose(drawn[~inside], truth[~inside], rtol=1e-6)
