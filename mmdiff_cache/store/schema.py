"""What a store contains, as values, and what that costs in bytes and files. Nothing here touches a disk."""

import math
import re
from dataclasses import dataclass, replace

from mmdiff_cache.config import Codec, Config
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.records import LabelSpec

from .arrays import arrays, hidden_states

FORMAT_VERSION = 1
LARGEST_CHUNK = 2**31 - 2**20
"""Bytes of one map."""
LARGEST_PICTURE = 100_000_000
"""Pixels of a picture or a label map."""


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
    """A concept list and the double blocks whose scores are stored. It cannot be cut: concepts interact."""

    name: str
    concepts: tuple[str, ...]
    blocks: tuple[str, ...]
    map_blocks: tuple[str, ...] = ()
    """The blocks averaged in the stored `maps`; all of `blocks` when empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Discriminative(Config):
    """The features of one discriminative encoder (Paper: Sec. 3.3)."""

    name: str
    layers: tuple[str, ...]
    """The encoder's blocks, counted from 0, in the order in which they are stored."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    channels: int
    weights_sha256: str = ""
    """Which encoder it was; not known in a plan, which reads no weights."""

    def __str__(self) -> str:
        blocks, sides = ", ".join(self.layers), " x ".join(map(str, (*self.grid, self.channels)))
        return f"{self.name}: blocks {blocks} of {sides}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelArray(Config):
    """One label set: what its values mean and the canvas [rows, columns] that every original map fits in."""

    spec: LabelSpec
    canvas: tuple[int, int]
    added: bool = False
    """Whether it came after the extraction, and has records of its own (label_writer)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSchema(Config):
    """The contents of a store: all that decides the shape of its arrays, except the number of samples."""

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
    cross_attention: tuple[str, ...] = ()
    """Double blocks whose averaged attention of image to text is stored."""
    discriminative: tuple[Discriminative, ...] = ()
    labels: tuple[LabelArray, ...] = ()
    partition_size: int = 64
    """Samples a partition: the unit of work, of completion and of redo."""
    codec: Codec = "zstd"
    drawn: bool = False
    """Whether the pictures were drawn from their prompts: each then has a seed, each map a noise level."""

    @property
    def extracted(self) -> "StoreSchema":
        """What extraction writes: all but the label sets that were added later."""
        return replace(self, labels=tuple(label for label in self.labels if not label.added))

    def __post_init__(self) -> None:
        for name in ("layers", "timesteps", "variants"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{name} of a store must be distinct and at least one, got {values}")
        if len(set(self.cross_attention)) != len(self.cross_attention):
            raise ConfigError(f"cross_attention of a store repeats a block: {self.cross_attention}")
        for name in ("grid", "image_size"):
            _check_positive(name, *getattr(self, name), length=2)
        for name in ("channels", "latent_channels", "partition_size"):
            _check_positive(name, getattr(self, name), length=1)
        for what, names in (
            ("concept vocabulary", [v.name for v in self.vocabularies]),
            ("discriminative encoder", [encoder.name for encoder in self.discriminative]),
            ("label set", [label.spec.name for label in self.labels]),
        ):
            for name in names:
                check_name(name, what)
            if len(set(names)) != len(names):
                raise ConfigError(f"{what} names must be distinct, got {names}")
        for encoder in self.discriminative:
            _check_encoder(encoder)
        for grid, channels in (
            (self.grid, self.channels),
            *((e.grid, e.channels) for e in self.discriminative),
        ):
            if 2 * math.prod(grid) * channels > LARGEST_CHUNK:
                raise ConfigError(
                    f"a map of {list(grid)} tokens and {channels} channels has more than the 2 GiB that "
                    "Blosc can encode"
                )
        for label in self.labels:
            _check_positive(f"canvas of {label.spec.name}", *label.canvas, length=2)
        for size in (self.image_size, *(label.canvas for label in self.labels)):
            if math.prod(size) > LARGEST_PICTURE:
                raise ConfigError(f"pictures and labels have at most {LARGEST_PICTURE:,} pixels, got {size}")
        for vocabulary in self.vocabularies:
            _check_vocabulary(vocabulary)


def _check_positive(name: str, *values: int, length: int) -> None:
    if len(values) != length or any(value < 1 for value in values):
        raise ConfigError(f"{name} of a store must be {length} positive number(s), got {values}")


def _check_encoder(encoder: Discriminative) -> None:
    if not encoder.layers or len(set(encoder.layers)) != len(encoder.layers):
        raise ConfigError(f"layers of {encoder.name} must be distinct and at least one, got {encoder.layers}")
    _check_positive(f"grid of {encoder.name}", *encoder.grid, length=2)
    _check_positive(f"channels of {encoder.name}", encoder.channels, length=1)


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
            f"map_blocks of vocabulary {vocabulary.name!r} must be among its blocks, got {unknown[0]!r}"
        )


def raw_bytes(schema: StoreSchema, samples: int) -> int:
    """Bytes of one split before any codec, hidden states as float16, without text."""
    return sum(spec.nbytes for spec in arrays(replace(schema, codec="zstd"), samples))


def estimated_bytes(
    schema: StoreSchema, samples: int, ratio: float | None = None, others: float = 1.0
) -> int:
    """Bytes of one split on disk.

    `ratio` is that of hidden states as float16 to what the codec leaves of them, `others` that of all other
    arrays; without a ratio, hidden states are counted as they are before the codec.
    """
    raw = hidden_states(replace(schema, codec="zstd"), samples).nbytes
    before_codec = hidden_states(schema, samples).nbytes
    hidden = raw / ratio if ratio else before_codec
    return math.ceil(hidden + (raw_bytes(schema, samples) - raw) / others)


def file_count(schema: StoreSchema, samples: int) -> int:
    """Files of one split: shards, coordinates, zarr.json of arrays and groups, and one record a partition."""
    specs = arrays(schema, samples)
    partitions = math.ceil(samples / schema.partition_size)
    shards = {"sample": samples * len(schema.variants), "partition": partitions, "array": 1}
    groups = {
        "/".join(spec.path.split("/")[:depth]) for spec in specs for depth in range(spec.path.count("/") + 1)
    }
    return sum(shards[spec.reach] + 1 for spec in specs) + len(groups) + partitions
