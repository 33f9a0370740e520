"""What arrays a store has: names, axes, sizes, chunks and what they mean. Pure values; nothing here touches a disk.

One Zarr group a split. docs/cache-format.md is the specification; this module is its only source in code.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mmdiff_cache.config import Config
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.records import STATISTICS, LabelSpec

FORMAT_VERSION = 1

Codec = Literal["zstd", "lz4"]
Scalar = int | float | str | bool
Split = Literal["sample", "partition", "whole"]
"""How far one file reaches: one (sample, variant), one partition, or the whole array (coordinates)."""

RATIOS: Mapping[tuple[str, str], float] = {
    ("zstd", "bfloat16"): 1.40,
    ("zstd", "float32"): 1.10,
    ("lz4", "bfloat16"): 1.24,
    ("lz4", "float32"): 1.02,
}
"""Raw bytes to stored bytes of hidden states, by codec and by the dtype in which the backbone ran.

The low end of what was measured: bfloat16 leaves three empty mantissa bits in a float16, float32 leaves none.
"""


def check_name(name: str, what: str) -> str:
    """Return a name that is safe as a folder name, or raise ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
        raise ConfigError(
            f"{what} {name!r} must be 1 to 100 letters, digits, '_' or '-', starting with a letter or digit"
        )
    return name


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant(Config):
    """One reading of a sample: which noise draw, and whether the picture was mirrored left to right."""

    noise_draw: int = 0
    flipped: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary(Config):
    """A concept list with the double blocks whose scores are stored. It cannot be cut: its concepts see each other."""

    name: str
    concepts: tuple[str, ...]
    blocks: tuple[str, ...]
    map_blocks: tuple[str, ...] = ()
    """The blocks averaged in the stored `maps`; all of `blocks` when empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelArray(Config):
    """One label set: what its values mean and the canvas [rows, columns] that every original map fits in."""

    spec: LabelSpec
    canvas: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSchema(Config):
    """The contents of a store: everything that decides the shape of its arrays, except the number of samples."""

    layers: tuple[str, ...]
    timesteps: tuple[float, ...]
    """t in [0, 1], 1 = pure noise, in the order in which they are stored."""
    grid: tuple[int, int]
    """Token rows h and columns w."""
    channels: int
    """C of the hidden states."""
    latent_channels: int
    """P of a packed latent token."""
    image_size: tuple[int, int]
    """Rows and columns of the network input, in pixels."""
    variants: tuple[Variant, ...] = (Variant(),)
    vocabularies: tuple[Vocabulary, ...] = ()
    labels: tuple[LabelArray, ...] = ()
    partition_size: int = 64
    """Samples a partition: the unit of work, of completion and of redo."""
    codec: Codec = "zstd"

    def __post_init__(self) -> None:
        for name in ("layers", "timesteps", "variants"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{name} of a store must be distinct and at least one, got {values}")
        for name in ("grid", "image_size"):
            _check_positive(name, *getattr(self, name), length=2)
        for name in ("channels", "latent_channels", "partition_size"):
            _check_positive(name, getattr(self, name), length=1)
        for what, names in (
            ("concept vocabulary", [v.name for v in self.vocabularies]),
            ("label set", [label.spec.name for label in self.labels]),
        ):
            for name in names:
                check_name(name, what)
            if len(set(names)) != len(names):
                raise ConfigError(f"{what} names must be distinct, got {names}")
        for label in self.labels:
            _check_positive(f"canvas of {label.spec.name}", *label.canvas, length=2)
        for vocabulary in self.vocabularies:
            _check_vocabulary(vocabulary)


def _check_positive(name: str, *values: int, length: int) -> None:
    if len(values) != length or any(value < 1 for value in values):
        raise ConfigError(f"{name} of a store must be {length} positive number(s), got {values}")


def _check_vocabulary(vocabulary: Vocabulary) -> None:
    for name in ("concepts", "blocks"):
        values: tuple[str, ...] = getattr(vocabulary, name)
        if not values or len(set(values)) != len(values):
            raise ConfigError(
                f"{name} of vocabulary {vocabulary.name!r} must be distinct and at least one, got {values}"
            )
    unknown = sorted(set(vocabulary.map_blocks) - set(vocabulary.blocks))
    if unknown:
        raise ConfigError(
            f"map_blocks of vocabulary {vocabulary.name!r} names {unknown[0]!r}, which is not one of its blocks"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of a split. `chunk` is read alone; `shard` is one file (None: a chunk is a file)."""

    path: str
    dtype: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    shard: tuple[int, ...] | None
    fill: Scalar
    split: Split
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    values: tuple[Scalar, ...] | None = None
    """Of a coordinate: its content, written with the metadata."""

    @property
    def itemsize(self) -> int:
        """Bytes a value; 0 for text, whose size is not known beforehand."""
        return 0 if self.dtype == "string" else np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array before any codec, without text."""
        return math.prod(self.shape) * self.itemsize


def arrays(schema: StoreSchema, samples: int) -> tuple[ArraySpec, ...]:
    """Every array of a split of `samples` samples, coordinates first."""
    return (
        *_coordinates(schema),
        _hidden_states(schema, samples),
        *_small_arrays(schema, samples),
        *(
            spec
            for vocabulary in schema.vocabularies
            for spec in _concept_arrays(schema, vocabulary, samples)
        ),
        *(spec for label in schema.labels for spec in _label_arrays(schema, label, samples)),
    )


def _hidden_states(schema: StoreSchema, samples: int) -> ArraySpec:
    steps, layers = len(schema.timesteps), len(schema.layers)
    one_map = (*schema.grid, schema.channels)
    return ArraySpec(
        path="hidden_states",
        dtype="float16",
        dims=("sample", "variant", "timestep", "layer", "height", "width", "channel"),
        shape=(samples, len(schema.variants), steps, layers, *one_map),
        chunk=(1, 1, 1, 1, *one_map),
        shard=(1, 1, steps, layers, *one_map),
        fill=math.nan,
        split="sample",
        attributes={
            "long_name": "outputs of transformer blocks, image tokens only, neither projected nor normalised",
            "units": "1",
            "coordinates": "sample_id noise_draw flipped",
        },
    )


def _coordinate(
    path: str, dtype: str, values: tuple[Scalar, ...], dim: str | None = None, **attributes: str
) -> ArraySpec:
    return ArraySpec(
        path=path,
        dtype=dtype,
        dims=(dim or path.rsplit("/")[-1],),
        shape=(len(values),),
        chunk=(len(values),),
        shard=None,
        fill="" if dtype == "string" else False if dtype == "bool" else math.nan if dtype == "float64" else 0,
        split="whole",
        attributes=attributes,
        values=values,
    )


def _coordinates(schema: StoreSchema) -> tuple[ArraySpec, ...]:
    draws = tuple(variant.noise_draw for variant in schema.variants)
    flips = tuple(variant.flipped for variant in schema.variants)
    t_note = "t in [0, 1]; 0 = the clean latent, 1 = pure noise; the group attribute 'noise' gives x_t"
    return (
        _coordinate("timestep", "float64", schema.timesteps, long_name=t_note, units="1"),
        _coordinate(
            "layer", "string", schema.layers, long_name="address of the block: kind.number, counted from 0"
        ),
        _coordinate("noise_draw", "int64", draws, "variant", long_name="number of the noise draw"),
        _coordinate(
            "flipped", "bool", flips, "variant", long_name="picture and labels mirrored left to right"
        ),
        _coordinate("statistic", "string", STATISTICS, long_name="what the last axis of audit holds"),
    )


def _partitioned(
    schema: StoreSchema,
    path: str,
    dtype: str,
    samples: int,
    dims: tuple[str, ...],
    inner: tuple[int, ...],
    chunk: tuple[int, ...],
    fill: Scalar,
    **attributes: Any,
) -> ArraySpec:
    """A small array: `inner` is the shape behind the sample axis; its file is one partition."""
    return ArraySpec(
        path=path,
        dtype=dtype,
        dims=("sample", *dims),
        shape=(samples, *inner),
        chunk=chunk,
        shard=(schema.partition_size, *inner),
        fill=fill,
        split="partition",
        attributes=attributes,
    )


def _small_arrays(schema: StoreSchema, samples: int) -> tuple[ArraySpec, ...]:
    size, variants = schema.partition_size, len(schema.variants)
    latent = (*schema.grid, schema.latent_channels)
    picture = (*schema.image_size, 3)
    audit = (variants, len(schema.timesteps), len(schema.layers), len(STATISTICS))
    return (
        _partitioned(
            schema, "latents", "float32", samples, ("height", "width", "latent_channel"), latent, (1, *latent), math.nan,
            long_name="clean latent before noising, packed to tokens", units="1",
        ),
        _partitioned(
            schema, "images", "uint8", samples, ("image_height", "image_width", "rgb"), picture, (1, *picture), 0,
            long_name="picture at network size, sRGB", units="1",
        ),
        _partitioned(
            schema, "audit", "float32", samples, ("variant", "timestep", "layer", "statistic"), audit, (size, *audit),
            math.nan, long_name="statistics of every map, taken in float32 before the cast to float16", units="1",
        ),
        _partitioned(
            schema, "sample_id", "string", samples, (), (), (size,), "", long_name="name of the sample in its data set"
        ),
        _partitioned(
            schema, "prompt", "string", samples, (), (), (size,), "", long_name="text that conditioned the backbone"
        ),
        _partitioned(
            schema, "noise_key", "uint64", samples, ("variant", "word"), (variants, 2), (size, variants, 2), 0,
            long_name="Philox key of the variant's noise",
        ),
    )  # fmt: skip


def _concept_arrays(schema: StoreSchema, vocabulary: Vocabulary, samples: int) -> tuple[ArraySpec, ...]:
    folder, variants, steps = f"concepts/{vocabulary.name}", len(schema.variants), len(schema.timesteps)
    maps = (len(vocabulary.concepts), *schema.grid)
    read_together = (len(vocabulary.blocks), *maps)
    return (
        _coordinate(f"{folder}/concept", "string", vocabulary.concepts, long_name="word of the vocabulary"),
        _coordinate(f"{folder}/block", "string", vocabulary.blocks, long_name="address of the double block"),
        _partitioned(
            schema, f"{folder}/scores", "float32", samples,
            ("variant", "timestep", "block", "concept", "height", "width"),
            (variants, steps, *read_together), (1, 1, 1, *read_together), math.nan,
            long_name="raw products o_x . o_c of image and concept outputs", units="1",
        ),
        _partitioned(
            schema, f"{folder}/maps", "float32", samples, ("variant", "concept", "height", "width"),
            (variants, *maps), (1, 1, *maps), math.nan,
            long_name="softmax over concepts, then the mean over map_blocks and all timesteps", units="1",
            map_blocks=list(vocabulary.map_blocks or vocabulary.blocks),
        ),
    )  # fmt: skip


def label_fill(spec: LabelSpec) -> Scalar:
    """What stands where a label map has no pixel: NaN for depth, the ignore id or 0 for ids."""
    return math.nan if spec.kind == "depth" else (spec.ignore or 0)


def _label_arrays(schema: StoreSchema, label: LabelArray, samples: int) -> tuple[ArraySpec, ...]:
    folder, spec = f"labels/{label.spec.name}", label.spec
    dtype, fill = ("float32" if spec.kind == "depth" else "uint8"), label_fill(spec)
    units = "metre" if spec.kind == "depth" else "1"
    meaning: dict[str, Any] = {"kind": spec.kind, "units": units}
    if spec.classes:
        meaning["classes"] = list(spec.classes)
    if spec.ignore is not None:
        meaning["ignore"] = spec.ignore
    if spec.valid_range is not None:
        meaning["valid_range_of_label"] = list(spec.valid_range)
    return (
        _partitioned(
            schema, f"{folder}/map", dtype, samples, ("image_height", "image_width"),
            schema.image_size, (1, *schema.image_size), fill, long_name=f"{spec.name} at network size", **meaning,
        ),
        _partitioned(
            schema, f"{folder}/original", dtype, samples, ("original_height", "original_width"),
            label.canvas, (1, *label.canvas), fill,
            long_name=f"{spec.name} as distributed, in the top left corner of the canvas", **meaning,
        ),
        _partitioned(
            schema, f"{folder}/original_size", "int32", samples, ("extent",), (2,), (schema.partition_size, 2), 0,
            long_name="true rows and columns of the original map", units="pixel",
        ),
    )  # fmt: skip


def raw_bytes(schema: StoreSchema, samples: int) -> int:
    """Bytes of one split before any codec, without text."""
    return sum(spec.nbytes for spec in arrays(schema, samples))


def estimated_bytes(schema: StoreSchema, samples: int, dtype: str = "bfloat16") -> int:
    """Bytes of one split on disk, rounded to the safe side: only hidden states are expected to shrink.

    `dtype` is that in which the backbone ran (RATIOS); another one counts as float32.
    """
    hidden = _hidden_states(schema, samples).nbytes
    ratio = RATIOS.get((schema.codec, dtype), RATIOS[schema.codec, "float32"])
    return math.ceil(hidden / ratio) + raw_bytes(schema, samples) - hidden


def file_count(schema: StoreSchema, samples: int) -> int:
    """Files of one split: shards, coordinates, zarr.json of arrays and groups, and one record a partition."""
    specs = arrays(schema, samples)
    partitions = math.ceil(samples / schema.partition_size)
    shards = {"sample": samples * len(schema.variants), "partition": partitions, "whole": 1}
    groups = {
        "/".join(spec.path.split("/")[:depth]) for spec in specs for depth in range(spec.path.count("/") + 1)
    }
    return sum(shards[spec.split] + 1 for spec in specs) + len(groups) + partitions
