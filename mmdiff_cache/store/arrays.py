"""The arrays of a split: path, axes, shape, chunk, shard and meaning of each, as the schema decides them.

docs/cache-format.md is the specification in words; this table is its only source in code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.records import STATISTICS

if TYPE_CHECKING:  # schema counts bytes with this table
    from .schema import Discriminative, LabelArray, StoreSchema, Vocabulary

Scalar = int | float | str | bool
Reach = Literal["sample", "partition", "array"]
"""What one file covers: one (sample, variant), one partition, or the whole array (coordinates)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of a split. `chunk` is read alone; `shard` is one file (None: the chunk is the file)."""

    path: str
    dtype: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    shard: tuple[int, ...] | None
    fill: Scalar
    reach: Reach
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    values: tuple[Scalar, ...] | None = None
    """Content of a coordinate, which is written with the metadata."""

    @property
    def itemsize(self) -> int:
        """Bytes a value; 0 for text, whose size is not known beforehand."""
        return 0 if self.dtype == "string" else np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array before any codec, without text."""
        return math.prod(self.shape) * self.itemsize


def arrays(schema: "StoreSchema", samples: int) -> tuple[ArraySpec, ...]:
    """Every array of a split of `samples` samples, coordinates first."""
    return (
        *_coordinates(schema),
        hidden_states(schema, samples),
        *_scales(schema, samples),
        *_sample_arrays(schema, samples),
        *_drawing_arrays(schema, samples),
        *(spec for words in schema.vocabularies for spec in _concept_arrays(schema, words, samples)),
        *(spec for encoder in schema.discriminative for spec in _encoder_arrays(schema, encoder, samples)),
        *(spec for label in schema.labels for spec in _label_arrays(schema, label, samples)),
    )


def hidden_states(schema: "StoreSchema", samples: int) -> ArraySpec:
    """The one large array: a chunk is one map, a shard is one (sample, variant)."""
    steps, layers = len(schema.timesteps), len(schema.layers)
    one_map, whole = (*schema.grid, schema.channels), schema.codec != "int8"
    note = "outputs of transformer blocks, image tokens only, neither projected nor normalised"
    return ArraySpec(
        path="hidden_states",
        dtype="float16" if whole else "int8",
        dims=("sample", "variant", "timestep", "layer", "height", "width", "channel"),
        shape=(samples, len(schema.variants), steps, layers, *one_map),
        chunk=(1, 1, 1, 1, *one_map),
        shard=(1, 1, steps, layers, *one_map),
        fill=math.nan if whole else 0,
        reach="sample",
        attributes={
            "long_name": note if whole else f"{note}; to be multiplied by hidden_states_scale",
            "units": "1",
            "coordinates": "sample_id noise_draw flipped",
        },
    )


def _scales(schema: "StoreSchema", samples: int) -> tuple[ArraySpec, ...]:
    if schema.codec != "int8":
        return ()
    axes = {"variant": len(schema.variants), "timestep": len(schema.timesteps), "layer": len(schema.layers)}
    note = "what one step of hidden_states is worth, for every channel of every map"
    return (
        _small(
            schema, samples, "hidden_states_scale", "float32", {**axes, "channel": schema.channels}, note,
            fill=math.nan, single=4,
        ),
    )  # fmt: skip


def filled_rows(spec: ArraySpec, samples: int) -> NDArray[Any]:
    """So many rows of an array in memory, full of its fill value."""
    dtype = object if spec.dtype == "string" else spec.dtype
    return np.full((samples, *spec.shape[1:]), spec.fill, dtype=dtype)


def _coordinate(path: str, dtype: str, values: tuple[Scalar, ...], dim: str, note: str) -> ArraySpec:
    fills: Mapping[str, Scalar] = {"string": "", "bool": False, "float64": math.nan, "int64": 0}
    return ArraySpec(
        path=path,
        dtype=dtype,
        dims=(dim,),
        shape=(len(values),),
        chunk=(len(values),),
        shard=None,
        fill=fills[dtype],
        reach="array",
        attributes={"long_name": note},
        values=values,
    )


def _coordinates(schema: "StoreSchema") -> tuple[ArraySpec, ...]:
    draws = tuple(variant.noise_draw for variant in schema.variants)
    flips = tuple(variant.flipped for variant in schema.variants)
    t_note = "t in [0, 1]: 0 = the clean latent, 1 = pure noise; the group's attribute 'noise' gives x_t"
    layer_note = "address of the block: its kind and its number, counted from 0"
    return (
        _coordinate("timestep", "float64", schema.timesteps, "timestep", t_note),
        _coordinate("layer", "string", schema.layers, "layer", layer_note),
        _coordinate("noise_draw", "int64", draws, "variant", "number of the noise draw"),
        _coordinate("flipped", "bool", flips, "variant", "picture mirrored left to right before encoding"),
        _coordinate("statistic", "string", STATISTICS, "statistic", "what the last axis of audit holds"),
    )


def _small(
    schema: "StoreSchema",
    samples: int,
    path: str,
    dtype: str,
    axes: Mapping[str, int],
    note: str,
    *,
    fill: Scalar,
    single: int = 1,
    units: str = "1",
    **attributes: Any,
) -> ArraySpec:
    """An array whose file is one partition; `axes` are those behind the sample axis.

    A chunk covers one sample and one position of the `single - 1` axes behind it; with `single=0` it covers
    the whole partition.
    """
    inner = tuple(axes.values())
    first = 1 if single else schema.partition_size
    return ArraySpec(
        path=path,
        dtype=dtype,
        dims=("sample", *axes),
        shape=(samples, *inner),
        chunk=(first, *(1 if axis < single - 1 else size for axis, size in enumerate(inner))),
        shard=(schema.partition_size, *inner),
        fill=fill,
        reach="partition",
        attributes={"long_name": note, **({} if dtype == "string" else {"units": units}), **attributes},
    )


def _grid(schema: "StoreSchema") -> dict[str, int]:
    return {"height": schema.grid[0], "width": schema.grid[1]}


def _pixels(schema: "StoreSchema") -> dict[str, int]:
    return {"image_height": schema.image_size[0], "image_width": schema.image_size[1]}


def _sample_arrays(schema: "StoreSchema", samples: int) -> tuple[ArraySpec, ...]:
    variants = {"variant": len(schema.variants)}
    maps = {**variants, "timestep": len(schema.timesteps), "layer": len(schema.layers)}
    latent = {**_grid(schema), "latent_channel": schema.latent_channels}
    latent_note = "clean latent before noising, packed to tokens"
    audit_note = "statistics of every map, taken in float32 before the cast to float16"
    return (
        _small(schema, samples, "latents", "float32", latent, latent_note, fill=math.nan),
        _small(schema, samples, "images", "uint8", {**_pixels(schema), "rgb": 3}, "picture, sRGB", fill=0),
        _small(
            schema, samples, "audit", "float32", {**maps, "statistic": len(STATISTICS)}, audit_note,
            fill=math.nan, single=0,
        ),
        _small(schema, samples, "sample_id", "string", {}, "name of the sample", fill="", single=0),
        _small(schema, samples, "prompt", "string", {}, "text given to the model", fill="", single=0),
        _small(
            schema, samples, "noise_key", "uint64", {**variants, "word": 2}, "Philox key of the noise",
            fill=0, single=0,
        ),
    )  # fmt: skip


def _drawing_arrays(schema: "StoreSchema", samples: int) -> tuple[ArraySpec, ...]:
    if not schema.drawn:
        return ()
    seed_note = "seed of the noise that the picture was drawn from"
    sigma_note = "noise level at which the maps of a timestep were captured"
    return (
        _small(schema, samples, "generation_seed", "int64", {}, seed_note, fill=-1, single=0),
        _small(
            schema, samples, "sigma", "float32", {"timestep": len(schema.timesteps)}, sigma_note,
            fill=math.nan, single=0,
        ),
    )  # fmt: skip


def _concept_arrays(schema: "StoreSchema", words: "Vocabulary", samples: int) -> tuple[ArraySpec, ...]:
    folder, variants = f"concepts/{words.name}", {"variant": len(schema.variants)}
    maps = {"concept": len(words.concepts), **_grid(schema)}
    scores = {**variants, "timestep": len(schema.timesteps), "block": len(words.blocks), **maps}
    score_note = "raw products o_x . o_c of image and concept attention outputs"
    map_note = "softmax over concepts, then the mean over map_blocks and all timesteps"
    averaged = list(words.map_blocks or words.blocks)
    return (
        _coordinate(f"{folder}/concept", "string", words.concepts, "concept", "word of the vocabulary"),
        _coordinate(f"{folder}/block", "string", words.blocks, "block", "address of the double block"),
        _small(
            schema, samples, f"{folder}/scores", "float32", scores, score_note, fill=math.nan, single=3
        ),
        _small(
            schema, samples, f"{folder}/maps", "float32", {**variants, **maps}, map_note,
            fill=math.nan, single=2, map_blocks=averaged,
        ),
    )  # fmt: skip


def discriminative_path(name: str) -> str:
    """Where the features of an encoder lie in a split."""
    return f"discriminative/{name}/features"


def _encoder_arrays(schema: "StoreSchema", encoder: "Discriminative", samples: int) -> tuple[ArraySpec, ...]:
    """A shard is one (sample, variant), as with hidden states: megabytes, too many to hold a partition's."""
    one_map = (*encoder.grid, encoder.channels)
    note = "number of the encoder's block, counted from 0"  # not 'layer': a tree has that at its root
    return (
        _coordinate(
            f"discriminative/{encoder.name}/dino_layer", "string", encoder.layers, "dino_layer", note
        ),
        ArraySpec(
            path=discriminative_path(encoder.name),
            dtype="float16",
            dims=("sample", "variant", "dino_layer", "dino_height", "dino_width", "dino_channel"),
            shape=(samples, len(schema.variants), len(encoder.layers), *one_map),
            chunk=(1, 1, 1, *one_map),
            shard=(1, 1, len(encoder.layers), *one_map),
            fill=math.nan,
            reach="sample",
            attributes={"long_name": f"block outputs of {encoder.name}, patch tokens only", "units": "1"},
        ),
    )


def _label_arrays(schema: "StoreSchema", label: "LabelArray", samples: int) -> tuple[ArraySpec, ...]:
    folder, spec, fill = f"labels/{label.spec.name}", label.spec, label.spec.fill
    dtype, units = ("float32", "metre") if spec.kind == "depth" else ("uint8", "1")
    canvas = {"original_height": label.canvas[0], "original_width": label.canvas[1]}
    original_note = f"{spec.name} as distributed, in the top left corner of a canvas"
    meaning: dict[str, Any] = {"kind": spec.kind}
    if spec.classes:
        meaning["classes"] = list(spec.classes)
    if spec.ignore is not None:
        meaning["ignore"] = spec.ignore
    if spec.valid_range is not None:
        meaning["label_range"] = list(spec.valid_range)
    if spec.crop is not None:
        meaning["scored_crop"] = list(spec.crop)
    return (
        _small(
            schema, samples, f"{folder}/map", dtype, _pixels(schema), f"{spec.name} at network size",
            fill=fill, units=units, **meaning,
        ),
        _small(
            schema, samples, f"{folder}/original", dtype, canvas, original_note,
            fill=fill, units=units, **meaning,
        ),
        _small(
            schema, samples, f"{folder}/original_size", "int32", {"extent": 2},
            "rows and columns of the original map", fill=0, single=0, units="pixel",
        ),
    )  # fmt: skip
