"""A converted store holds what was kept of its parent, and is a store like any other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmdiff_cache.errors import ConfigError, DamageError, StoreError, StoreIncomplete
from mmdiff_cache.store.concepts import concept_maps
from mmdiff_cache.store.convert import Selection, convert, plan_conversion
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.quantise import round_trip
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.verify import verify
from mmdiff_cache.store.writer import open_writer
from tests.store.synthetic import IDENTITY, counted_files, make_features, make_manifest, write_store


def converted(source: Path, target: Path, **selection: object) -> Path:
    convert(plan_conversion(source, target, Selection(**selection)))  # type: ignore[arg-type]
    return target


def test_all_of_it_is_the_same_but_for_its_parent(finished: Path, tmp_path: Path) -> None:
    before, after = counted_files(finished), counted_files(converted(finished, tmp_path / "all"))
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == ["manifest.json"]
    stored, copied = open_store(finished).manifest, open_store(tmp_path / "all").manifest
    assert copied.fingerprint == stored.fingerprint
    assert copied.provenance["parent"]["fingerprint"] == stored.fingerprint


def test_less_of_it_is_what_an_extraction_of_less_would_give(
    finished: Path, manifest: Manifest, tmp_path: Path
) -> None:
    path = converted(
        finished,
        tmp_path / "less",
        splits=["train"],
        layers=["single.4"],
        timesteps=[0.001, 0.9],
        variants=[1],
        limit=5,
    )
    reader = open_store(path)["train"]
    assert (reader.ids, reader.layers) == (manifest.splits["train"][:5], ("single.4",))
    assert reader.timesteps == (0.9, 0.001)
    truth = make_features(manifest.schema, list(reader.ids))
    everyone = range(5)
    np.testing.assert_array_equal(
        reader.hidden_states(everyone), truth.hidden_states[:, 1][:, [0, 2]][:, :, [1]]
    )
    np.testing.assert_array_equal(reader.audit(), truth.audit[:, [1]][:, :, [0, 2]][:, :, :, [1]])
    scores = truth.concept_scores["scenes"][:, 1][:, [0, 2]]
    np.testing.assert_array_equal(reader.concept_scores("scenes", everyone), scores)
    np.testing.assert_array_equal(reader.concept_maps("scenes", everyone), concept_maps(scores, [1]))
    dino = reader.discriminative_features("dino", everyone)
    np.testing.assert_array_equal(dino, truth.discriminative["dino"][:, 1])
    before = open_store(finished)["train"]
    for name in reader.label_specs:
        np.testing.assert_array_equal(reader.labels(name, everyone), before.labels(name, everyone))
        np.testing.assert_array_equal(reader.original_label(name, 3), before.original_label(name, 3))
    assert verify(path).sound


def test_int8_has_an_identity_of_its_own_and_no_way_back(
    finished: Path, manifest: Manifest, tmp_path: Path
) -> None:
    path = converted(finished, tmp_path / "int8", codec="int8")
    truth = make_features(manifest.schema, list(manifest.splits["train"])).hidden_states
    reader = open_store(path)["train"]
    np.testing.assert_array_equal(reader.hidden_states(range(6), variant=1), round_trip(truth[:, 1]))
    assert open_store(path).manifest.fingerprint != manifest.fingerprint
    assert verify(path).sound
    with pytest.raises(ConfigError, match="cannot come back"):
        plan_conversion(path, tmp_path / "back", Selection(codec="zstd"))


def test_other_codecs_keep_every_bit(finished: Path, manifest: Manifest, tmp_path: Path) -> None:
    path = converted(finished, tmp_path / "fast", codec="fast")
    truth = make_features(manifest.schema, list(manifest.splits["train"])).hidden_states
    np.testing.assert_array_equal(open_store(path)["train"].hidden_states(range(6)), truth[:, 0])
    assert open_store(path).manifest.fingerprint == manifest.fingerprint


def test_interrupted_and_run_again_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    whole = converted(finished, tmp_path / "whole", codec="int8")
    plan = plan_conversion(finished, tmp_path / "broken", Selection(codec="int8"))

    def stop(done: int, total: int, state: str) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, stop)
    assert 0 < open_store(tmp_path / "broken").samples_done < 9
    seen: list[int] = []
    convert(plan, lambda done, total, state: seen.append(done))
    assert seen == [5, 6, 7, 8, 9]
    assert counted_files(tmp_path / "broken") == counted_files(whole)


def test_failed_samples_stay_failed_and_missing_ones_are_an_error(tmp_path: Path, manifest: Manifest) -> None:
    write_store(tmp_path / "holes", manifest, failing=("train/002",))
    path = converted(tmp_path / "holes", tmp_path / "copy", codec="fast")
    assert open_store(path)["train"].failed == {2: "cannot decode: truncated"}
    (tmp_path / "holes/partitions/test-000000.json").unlink()
    with pytest.raises(StoreIncomplete, match="test/é0"):
        converted(tmp_path / "holes", tmp_path / "other")
    (tmp_path / "holes/train.zarr/images/c.1.0.0.0").write_bytes(b"")
    with pytest.raises(DamageError, match=r"images/c\.1"):
        converted(tmp_path / "holes", tmp_path / "third", splits=["train"])


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"layers": ["single.9"]}, r"layer 'single.9' is not stored; stored: double.1, single.4"),
        ({"timesteps": [0.5]}, r"timestep 0.5 is not in"),
        ({"splits": ["val"]}, r"split 'val' is not stored"),
        ({"variants": [2]}, r"variant 2 is not stored"),
        ({"discriminative": ["clip"]}, r"encoder 'clip' is not stored; stored: dino"),
    ],
)
def test_what_is_not_there_is_refused(
    finished: Path, tmp_path: Path, selection: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        converted(finished, tmp_path / "x", **selection)
    assert not (tmp_path / "x").exists()


def test_other_places_are_left_alone(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="into itself"):
        converted(finished, finished, layers=["single.4"])
    write_store(tmp_path / "other", make_manifest(identity={**IDENTITY, "dtype": "bfloat16"}))
    with pytest.raises(StoreError, match="does not hold what is asked: identity dtype"):
        converted(finished, tmp_path / "other")


def test_noise_of_its_own_for_every_timestep_is_not_mixed_up(tmp_path: Path) -> None:
    manifest = make_manifest(identity={**IDENTITY, "noise": {"form": "flow", "seed": 7, "shared": False}})
    write_store(tmp_path / "s", manifest)
    with pytest.raises(ConfigError, match="noise draw j"):
        converted(tmp_path / "s", tmp_path / "x", timesteps=[0.26])
    converted(tmp_path / "s", tmp_path / "y", timesteps=[0.9, 0.26])


def test_the_configuration_is_that_of_what_was_kept(tmp_path: Path, manifest: Manifest) -> None:
    """Repair extracts by it, so it must give what is in the store."""
    config = {
        "layers": ["double.1", "single.4"], "timesteps": [0.9, 0.26, 0.001], "splits": ["train", "test"],
        "limit": None, "codec": "zstd", "dataset": "synthetic",
    }  # fmt: skip
    write_store(tmp_path / "s", replace(manifest, config=config))
    converted(tmp_path / "s", tmp_path / "less", layers=["single.4"], splits=["train"], limit=4, codec="int8")
    kept = open_store(tmp_path / "less").manifest.config
    assert kept == {
        **config, "layers": ["single.4"], "splits": ["train"], "limit": 4, "codec": "int8"
    }  # fmt: skip
    assert json.loads((tmp_path / "less/manifest.json").read_text())["provenance"]["parent"]


def test_a_finished_conversion_does_nothing_again(finished: Path, tmp_path: Path) -> None:
    path = converted(finished, tmp_path / "x", layers=["single.4"])
    before = counted_files(path)
    converted(finished, tmp_path / "x", layers=["single.4"])
    assert counted_files(path) == before
    with open_writer(path, open_store(path).manifest) as writer:
        assert not writer.pending("train")
