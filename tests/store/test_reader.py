"""Addressing, errors by name, one chunk a map, threads, pickling."""

import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mmdiff_cache.errors import ConfigError, StoreError
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.reader import open_store
from tests.store.synthetic import make_features


def test_read_addresses_by_value_and_name(finished: Path, manifest: Manifest) -> None:
    reader = open_store(finished)["train"]
    features = make_features(manifest.schema, ["train/003"])
    for t, timestep in enumerate((0.9, 0.26 + 5e-7, 0.001)):
        np.testing.assert_array_equal(
            reader.read(sample=3, timestep=timestep, layer="single.4"), features.hidden_states[0, 0, t, 1]
        )


def test_out_is_filled_and_returned(finished: Path) -> None:
    reader = open_store(finished)["train"]
    out = np.zeros((2, 3, 2, 2, 3, 8), np.float16)
    assert reader.hidden_states([1, 0], out=out) is out
    np.testing.assert_array_equal(out, reader.hidden_states([1, 0]))
    with pytest.raises(ConfigError, match="out must be float16"):
        reader.hidden_states([1], out=out)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.read(0, 0.25, "single.4"), r"timestep 0\.25 .* stored: 0\.9, 0\.26, 0\.001"),
        (lambda r: r.read(0, float("nan"), "single.4"), "timestep nan"),
        (lambda r: r.read(0, 0.26, "single.5"), r"layer 'single\.5' .* stored: double\.1, single\.4"),
        (lambda r: r.read(6, 0.26, "single.4"), "sample 6 .* 0 to 5"),
        (lambda r: r.read(-1, 0.26, "single.4"), "sample -1"),
        (lambda r: r.read(0, 0.26, "single.4", variant=2), "variant 2"),
        (lambda r: r.concept_maps("voc", [0]), "'voc' .* stored: scenes, depth"),
        (lambda r: r.labels("normals", [0]), "'normals' .* stored: classes, depth, salient"),
    ],
)
def test_what_is_not_stored_is_named_with_what_is(finished: Path, call, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call(open_store(finished)["train"])


def test_an_unknown_split_and_a_missing_store_are_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'val' .* train, test"):
        open_store(finished)["val"]
    with pytest.raises(StoreError, match="is not a store"):
        open_store(tmp_path)
    with pytest.raises(StoreError, match="is not a store"):
        open_store(tmp_path / "absent")


def test_one_map_touches_one_chunk(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes fetched are one inner chunk, and once the shard's index."""
    reader = open_store(finished)["train"]
    fetched: list[tuple[str, int, int]] = []
    pread = os.pread

    def noting(descriptor: int, length: int, offset: int) -> bytes:
        fetched.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, length, offset))
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", noting)
    reader.read(5, 0.001, "double.1", variant=1)
    reader.read(5, 0.001, "double.1", variant=1)
    assert {name for name, _, _ in fetched} == {"c.5.1.0.0.0.0.0"}
    index, *chunks = (length for _, length, _ in fetched)
    assert index == 6 * 16 + 4  # six (offset, length) pairs and their crc32c
    assert len(chunks) == 2
    assert max(chunks) < 2 * 3 * 8 * 2 + 64


def test_lists_of_positions_read_only_their_chunks(finished: Path) -> None:
    reader = open_store(finished)["train"]
    asked = {"timesteps": [0.001, 0.9], "layers": ["single.4"]}
    assert reader.hidden_states([5, 0, 2], **asked).shape == (3, 2, 1, 2, 3, 8)
    assert reader.concept_scores("scenes", [5, 0], timesteps=[0.001, 0.9]).shape == (2, 2, 2, 2, 2, 3)
    assert reader.images([5, 0, 2]).shape == (3, 8, 12, 3)


def test_threads_read_what_one_thread_reads(finished: Path) -> None:
    reader = open_store(finished)["train"]
    expected = open_store(finished)["train"].hidden_states(range(6))
    with ThreadPoolExecutor(4) as pool:
        for sample, values in enumerate(pool.map(lambda n: reader.hidden_states([n])[0], list(range(6)) * 4)):
            np.testing.assert_array_equal(values, expected[sample % 6])


def test_a_store_can_be_pickled_and_moved(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(finished, moved)
    store = pickle.loads(pickle.dumps(open_store(moved)))
    expected = open_store(finished)["test"].hidden_states([0, 1, 2])
    np.testing.assert_array_equal(store["test"].hidden_states([0, 1, 2]), expected)
