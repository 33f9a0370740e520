"""What is written is what is read, whatever the shapes; bytes do not depend on the order of the work."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmdiff_cache.records import draw_noise, noise_key
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.quantise import round_trip
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.schema import LabelArray, StoreSchema, Variant, Vocabulary
from mmdiff_cache.store.writer import open_writer
from tests.store.synthetic import (
    CLASSES,
    DEPTH,
    counted_files,
    make_features,
    make_manifest,
    make_sample,
    make_schema,
    write_partition,
    write_store,
)

small = st.integers(1, 3)


@st.composite
def schemas(draw: st.DrawFn) -> StoreSchema:
    size = st.tuples(small, small)
    layers = [f"single.{n}" for n in range(draw(small))]
    vocabulary = Vocabulary(
        name="v", concepts=("a", "b"), blocks=tuple(f"double.{n}" for n in range(draw(small)))
    )
    labels = tuple(LabelArray(spec=spec, canvas=draw(size)) for spec in (CLASSES, DEPTH))
    return StoreSchema(
        layers=tuple(draw(st.permutations(layers))),
        timesteps=tuple(draw(st.lists(st.floats(0, 1), min_size=1, max_size=3, unique=True))),
        grid=draw(size),
        channels=draw(st.integers(1, 5)),
        latent_channels=draw(small),
        image_size=draw(size),
        variants=tuple(Variant(noise_draw=n) for n in range(draw(st.integers(1, 2)))),
        vocabularies=(vocabulary,) if draw(st.booleans()) else (),
        labels=labels[: draw(st.integers(0, 2))],
        partition_size=draw(st.integers(1, 4)),
        codec=draw(st.sampled_from(("zstd", "fast", "int8"))),
    )


def assert_holds(path: Path, manifest: Manifest) -> None:
    """Every value of every sample, by every way of the reader, equals what was given to the writer."""
    schema, store = manifest.schema, open_store(path)
    assert store.samples_done == store.samples_planned == sum(map(len, manifest.splits.values()))
    for split, ids in manifest.splits.items():
        reader, everyone = store[split], range(len(ids))
        features = make_features(schema, list(ids))
        samples = [make_sample(schema, sample_id) for sample_id in ids]
        assert reader.ids == ids
        for variant in range(len(schema.variants)):
            hidden = reader.hidden_states(everyone, variant=variant)
            assert hidden.dtype == np.float16
            given = features.hidden_states[:, variant]
            np.testing.assert_array_equal(hidden, round_trip(given) if schema.codec == "int8" else given)
            for words in schema.vocabularies:
                scores = reader.concept_scores(words.name, everyone, variant=variant)
                maps = reader.concept_maps(words.name, everyone, variant=variant)
                np.testing.assert_array_equal(scores, features.concept_scores[words.name][:, variant])
                np.testing.assert_array_equal(maps, features.concept_maps[words.name][:, variant])
        np.testing.assert_array_equal(reader.latents(everyone), features.latents)
        np.testing.assert_array_equal(reader.audit(), features.audit)
        np.testing.assert_array_equal(reader.images(everyone), [sample.image for sample in samples])
        assert reader.prompts(everyone) == [sample.prompt for sample in samples]
        assert [reader.content_hash(n) for n in everyone] == [sample.content_hash for sample in samples]
        for name in reader.label_specs:
            np.testing.assert_array_equal(reader.labels(name, everyone), [s.labels[name] for s in samples])
            for n, sample in enumerate(samples):
                np.testing.assert_array_equal(reader.original_label(name, n), sample.original_labels[name])


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=schemas(), samples=st.integers(1, 6))
def test_every_shape_comes_back(schema: StoreSchema, samples: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_manifest(schema, train=samples, test=1)
        write_store(Path(folder) / "store", manifest)
        assert_holds(Path(folder) / "store", manifest)


def test_the_full_schema_comes_back(finished: Path, manifest: Manifest) -> None:
    assert_holds(finished, manifest)


def test_bytes_do_not_depend_on_order_batches_or_interruption(
    finished: Path, manifest: Manifest, tmp_path: Path
) -> None:
    """Partitions backwards, samples one by one, and a writer that leaves in the middle of a partition."""
    path = tmp_path / "other"
    with open_writer(path, manifest) as writer:
        last = writer.pending("train")[-1]
        with writer.begin(last) as partition:
            name = manifest.splits["train"][last.start]
            partition.write(0, [make_sample(manifest.schema, name)], make_features(manifest.schema, [name]))
    with open_writer(path, manifest) as writer:
        for partition in [*reversed(writer.pending("train")), *writer.pending("test")]:
            write_partition(writer, partition, batch=1)
    assert counted_files(path) == counted_files(finished)
    assert not list((path / "staging").iterdir())


def test_a_finished_store_has_nothing_pending(finished: Path, manifest: Manifest) -> None:
    before = counted_files(finished)
    with open_writer(finished, manifest) as writer:
        assert [writer.pending(split) for split in manifest.splits] == [[], []]
    assert counted_files(finished) == before


def test_arrays_of_nothing_but_fill_values_are_written(tmp_path: Path) -> None:
    """An empty mask is a mask: its file must exist, for a missing file is damage."""
    schema = make_schema(partition_size=2, vocabularies=(), labels=make_schema().labels[2:])
    manifest = make_manifest(schema, train=2, test=1)
    with open_writer(tmp_path / "s", manifest) as writer:
        for partition in (*writer.pending("train"), *writer.pending("test")):
            ids = manifest.splits[partition.split][partition.start : partition.stop]
            samples = [make_sample(schema, name) for name in ids]
            for sample in samples:
                for maps in (sample.labels, sample.original_labels):
                    maps["salient"][:] = 0
                sample.image[:] = 0
            with writer.begin(partition) as target:
                target.write(0, samples, make_features(schema, list(ids)))
                target.commit()
    reader = open_store(tmp_path / "s")["train"]
    assert not reader.labels("salient", [0, 1]).any()
    assert not reader.images([0, 1]).any()


def test_noise_can_be_recomputed_from_the_stored_key(finished: Path, manifest: Manifest) -> None:
    keys = open_store(finished)["train"].noise_keys([4])[0]
    for variant, setting in enumerate(manifest.schema.variants):
        assert tuple(map(int, keys[variant])) == noise_key(7, "train/004", setting.noise_draw)
        again = np.random.Generator(np.random.Philox(key=keys[variant])).standard_normal(
            (4, 2, 2), np.float32
        )
        np.testing.assert_array_equal(again, draw_noise(7, "train/004", setting.noise_draw, (4, 2, 2)))


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 0, 4, 1], [2, 2], [3, 4], []])
def test_any_selection_equals_indexing_the_whole(
    finished: Path, manifest: Manifest, order: list[int]
) -> None:
    reader = open_store(finished)["train"]
    features = make_features(manifest.schema, list(manifest.splits["train"]))
    asked = reader.hidden_states(order, timesteps=[0.001, 0.9], layers=["single.4"], variant=1)
    np.testing.assert_array_equal(asked, features.hidden_states[order, 1][:, [2, 0]][:, :, [1]])
    scores = reader.concept_scores("scenes", order, timesteps=[0.26], variant=1)
    np.testing.assert_array_equal(scores, features.concept_scores["scenes"][order, 1][:, [1]])
    np.testing.assert_array_equal(reader.latents(order), features.latents[order])
