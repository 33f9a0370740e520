"""Schema, partitions and cost formulas, without a disk."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmdiff_cache.datasets.base import Dataset
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.store.arrays import arrays
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.records import partitions
from mmdiff_cache.store.schema import (
    LabelArray,
    StoreSchema,
    Variant,
    Vocabulary,
    estimated_bytes,
    file_count,
    raw_bytes,
)
from tests.store.synthetic import counted_files, make_schema


@given(samples=st.integers(1, 500), size=st.integers(1, 100))
def test_partitions_cover_each_sample_once(samples: int, size: int) -> None:
    cut = partitions("train", samples, size)
    assert [n for p in cut for n in range(p.start, p.stop)] == list(range(samples))
    assert all(p.size == size for p in cut[:-1])
    assert len({p.name for p in cut}) == len(cut)


def test_schema_survives_json() -> None:
    schema = make_schema()
    assert StoreSchema.from_json(schema.to_json()) == schema


@pytest.mark.parametrize("samples", [1, 4, 5])
def test_chunks_and_shards_divide_as_zarr_needs(samples: int) -> None:
    for spec in arrays(make_schema(), samples):
        assert len(spec.dims) == len(spec.shape) == len(spec.chunk)
        if spec.shard is not None:
            assert all(shard % chunk == 0 for shard, chunk in zip(spec.shard, spec.chunk, strict=True))


def test_file_count_is_what_lies_on_disk(finished: Path, manifest: Manifest) -> None:
    counted = sum(file_count(manifest.schema, len(ids)) for ids in manifest.splits.values())
    assert len(counted_files(finished)) == counted + 1  # the manifest


def test_raw_bytes_of_the_papers_setting() -> None:
    """VOC with FLUX.1-dev at 512 px: 100.7 MB of hidden states an image (Paper: Sec. 3.1)."""
    schema = StoreSchema(
        layers=("single.4", "single.9", "single.14", "single.19"),
        timesteps=(0.35, 0.26, 0.15, 0.05),
        grid=(32, 32),
        channels=3072,
        latent_channels=64,
        image_size=(512, 512),
    )
    hidden = 10582 * 16 * 1024 * 3072 * 2
    small = 10582 * (1024 * 64 * 4 + 512 * 512 * 3 + 16 * 7 * 4 + 16)
    coordinates = 4 * 8 + 8 + 1
    assert raw_bytes(schema, 10582) == hidden + small + coordinates
    assert estimated_bytes(schema, 10582) == hidden + small + coordinates, "nothing is assumed of the codec"
    assert estimated_bytes(schema, 10582, 1.4) == math.ceil(hidden / 1.4) + small + coordinates
    rounded = replace(schema, codec="int8")
    assert estimated_bytes(rounded, 10582) == hidden // 2 + small + coordinates


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": ()}, "layers"),
        ({"layers": ("single.4", "single.4")}, "layers"),
        ({"timesteps": (0.1, 0.1)}, "timesteps"),
        ({"variants": (Variant(), Variant())}, "variants"),
        ({"grid": (2, 0)}, "grid"),
        ({"channels": 0}, "channels"),
        ({"vocabularies": (Vocabulary(name="../x", concepts=("a", "b"), blocks=("double.0",)),)}, r"\.\./x"),
        ({"vocabularies": (Vocabulary(name="x", concepts=("a", "a"), blocks=("double.0",)),)}, "concepts"),
        (
            {"vocabularies": (Vocabulary(name="x", concepts=("a",), blocks=("b",), map_blocks=("c",)),)},
            "map_blocks",
        ),
        ({"labels": (LabelArray(spec=LabelSpec(name="a", kind="mask"), canvas=Dataset.canvas),)}, "canvas"),
        ({"labels": (LabelArray(spec=LabelSpec(name="a", kind="mask"), canvas=(3, 3)),) * 2}, "distinct"),
    ],
)
def test_impossible_schemas_are_refused_by_field(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_schema(**changes)
