"""The summary says what the arrays say, and every store is found."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmdiff_cache.records import STATISTICS
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.summary import find_stores, summarize
from mmdiff_cache.store.writer import open_writer
from tests.store.synthetic import make_features, make_manifest, make_sample, write_partition, write_store


def test_audit_is_summed_over_samples_and_splits(finished: Path, manifest: Manifest) -> None:
    summary = summarize(open_store(finished))
    audit = np.concatenate(
        [make_features(manifest.schema, list(ids)).audit for ids in manifest.splits.values()]
    ).astype(np.float64)
    shown = {(m.timestep, m.layer): m for m in summary.maps}
    assert len(shown) == 6
    values = audit[:, :, 1, 0]
    found = shown[0.26, "double.1"]
    assert found.mean == pytest.approx(values[..., STATISTICS.index("mean")].mean())
    assert found.rms == pytest.approx(np.sqrt((values[..., STATISTICS.index("rms")] ** 2).mean()))
    assert found.max_abs == values[..., STATISTICS.index("max_abs")].max()
    assert found.clipped == int(values[..., STATISTICS.index("clipped")].sum())


def test_label_shares_and_depth_range(finished: Path, manifest: Manifest) -> None:
    summary = summarize(open_store(finished))
    found = {(label.name, label.split): label for label in summary.labels}
    samples = [make_sample(manifest.schema, name) for name in manifest.splits["train"]]
    classes = np.stack([sample.labels["classes"] for sample in samples])
    shares = found["classes", "train"].shares
    assert shares["ball"] == pytest.approx((classes == 2).mean())
    assert sum(shares.values()) == pytest.approx(1)
    depth = np.stack([sample.labels["depth"] for sample in samples])
    shown = found["depth", "train"]
    assert (shown.low, shown.high) == (depth.min(), depth.max())
    assert shown.mean == pytest.approx(depth.mean())
    assert set(found["salient", "test"].shares) == {"outside", "inside"}


def test_arrays_add_up_to_the_disk(finished: Path) -> None:
    store = open_store(finished)
    summary = summarize(store)
    groups = sum((finished / n).stat().st_size for n in store.manifest.metadata if n.endswith("zarr.json"))
    assert sum(array.disk_bytes for array in summary.arrays) + groups == store.disk_bytes
    hidden = next(array for array in summary.arrays if array.path == "hidden_states")
    assert hidden.codec == "blosc zstd 1 shuffle, crc32c"
    assert hidden.raw_bytes == 9 * 2 * 3 * 2 * 2 * 3 * 8 * 2
    assert hidden.ratio == pytest.approx(hidden.raw_bytes / hidden.disk_bytes)


def test_the_summary_is_plain_json(finished: Path) -> None:
    text = json.loads(json.dumps(summarize(open_store(finished)).to_json()))
    assert text["splits"]["train"] == {"planned": 6, "done": 6, "failed": 0, "pending": 0, "reasons": {}}
    assert text["identity"]["noise.seed"] == 7


def test_str_is_short_and_true(finished: Path) -> None:
    text = str(open_store(finished))
    assert "train: 6 of 6 samples" in text
    assert "3 timesteps (0.9, 0.26, 0.001)" in text
    assert len(text.splitlines()) < 12


def test_an_empty_and_a_half_finished_store_can_be_summarised(tmp_path: Path) -> None:
    manifest = make_manifest()
    with open_writer(tmp_path / "s", manifest) as writer:
        empty = summarize(open_store(tmp_path / "s"))
        assert (empty.maps, empty.labels, empty.splits["train"].pending) == ((), (), 6)
        write_partition(writer, writer.pending("train")[1], failing=("train/005",))
        half = summarize(open_store(tmp_path / "s"))
    assert half.splits["train"].reasons == {"train/005": "cannot decode: truncated"}
    assert (half.splits["train"].done, half.splits["train"].pending) == (1, 4)
    assert len(half.maps) == 6
    assert [label.split for label in half.labels] == ["train"] * 3


def test_every_store_is_found_and_a_broken_one_is_listed(tmp_path: Path) -> None:
    for name in ("voc/flux", "voc/flux-2"):
        write_store(tmp_path / name, make_manifest(train=1, test=1))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    (tmp_path / "pictures").mkdir()
    found = find_stores(tmp_path)
    assert [Path(entry.path).relative_to(tmp_path).as_posix() for entry in found] == [
        "broken",
        "voc/flux",
        "voc/flux-2",
    ]
    assert "format_version" in (found[0].fault or "")
    assert [(entry.dataset, entry.done, entry.planned, entry.fault) for entry in found[1:]] == [
        ("synthetic", 2, 2, None)
    ] * 2
    assert all(0 <= entry.age_seconds < 3600 for entry in found)
    assert find_stores(tmp_path / "absent") == []
