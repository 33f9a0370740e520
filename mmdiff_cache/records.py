"""Values that cross packages: samples, labels, noise keys, batches of features.

Arrays here are numpy, so that the store and the data sets need no torch. Axis letters: B sample, V variant,
T timestep, L layer, h w token grid, C backbone channels, K concepts, H W pixels.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LabelKind = Literal["classes", "mask", "depth"]
Progress = Callable[[int, int, str], None]
"""How long work reports: called with what is done, the total, and a few words on its state (or '')."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelSpec:
    """What the values of one label set mean.

    `classes` maps are uint8 ids, `mask` maps are uint8 0 or 1, `depth` maps are float32 metres. `ignore` is
    the id that no loss and no metric counts; for depth, values outside `valid_range` are not counted. At
    original size only the rows and columns of `crop` = (top, bottom, left, right) are scored.
    """

    name: str
    kind: LabelKind
    classes: tuple[str, ...] = ()
    ignore: int | None = None
    valid_range: tuple[float, float] | None = None
    crop: tuple[int, int, int, int] | None = None

    @property
    def fill(self) -> float | int:
        """What stands where a map has no pixel: NaN for depth, the ignored id or else 0 for ids."""
        return math.nan if self.kind == "depth" else (self.ignore or 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One picture of a data set with its labels, at the size in which it was distributed."""

    sample_id: str
    image: NDArray[np.uint8]
    """[H W 3], RGB."""
    prompts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Prompts that the data set itself knows, by kind: `scene`, `oracle`. The empty prompt is not listed."""
    labels: Mapping[str, NDArray[np.generic]] = field(default_factory=dict[str, NDArray[np.generic]])
    """Label maps [H W] by name, as the data set's LabelSpec of that name describes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSample:
    """A sample as it enters the backbone and the store, with labels at network size and as distributed."""

    sample_id: str
    image: NDArray[np.uint8]
    """[H W 3] at network size."""
    prompt: str
    labels: Mapping[str, NDArray[np.generic]]
    """[H W] at network size, resized by nearest neighbour."""
    original_labels: Mapping[str, NDArray[np.generic]]
    """[H0 W0] as distributed; evaluation happens there."""
    content_hash: str
    """SHA-256 (hex) of the original picture and labels: tells whether a source file changed."""
    generation_seed: int | None = None
    """Seed with which the picture was drawn; None for one that was there."""


LARGEST_SEED = 2**63 - 1
"""A seed is stored as int64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureRequest:
    """A picture to be drawn: what stands in a sample's place before it has one."""

    sample_id: str
    prompt: str
    seed: int

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex) of prompt and seed, which are all that the picture's source is."""
        return hashlib.sha256(f"mmdiff-cache prompt 1\0{self.seed}\0{self.prompt}".encode()).hexdigest()


STATISTICS = ("mean", "rms", "max_abs", "entropy", "clipped", "flushed", "non_finite")
"""The last axis of `FeatureBatch.audit`: statistics of one map, taken in float32 before the cast.

mean, rms and max_abs are over all tokens and channels; entropy is that of the token norms' histogram, in nats
(docs/cache-format.md gives the bins); clipped, flushed and non_finite are counts of values beyond +-65504, of
non-zero values that float16 turns into zero, and of NaN or infinite values.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureBatch:
    """What one pass of the backbone yields for B samples; nothing in it is projected or normalised."""

    hidden_states: NDArray[np.float16]
    """[B V T L h w C], the outputs of the tapped blocks, image tokens only."""
    concept_scores: Mapping[str, NDArray[np.float32]]
    """[B V T block K h w] per vocabulary: raw o_x . o_c of every double block run (Paper: Sec. 3.2)."""
    concept_maps: Mapping[str, NDArray[np.float32]]
    """[B V K h w] per vocabulary: softmax over concepts, mean over default blocks and timesteps (Eq. 4)."""
    latents: NDArray[np.float32]
    """[B h w P], the clean latent before noising, in tokens: the baseline that needs no transformer."""
    audit: NDArray[np.float32]
    """[B V T L statistic], see STATISTICS."""
    discriminative: Mapping[str, NDArray[np.float16]] = field(default_factory=dict[str, NDArray[np.float16]])
    """[B V L h w D] per encoder, with its own layers, grid and channels (Paper: Sec. 3.3)."""
    sigmas: NDArray[np.float32] | None = None
    """[B T], the noise level at which each map was really captured; given where pictures were drawn."""


def noise_key(seed: int, sample_id: str, draw: int) -> tuple[int, int]:
    """The 128-bit Philox key of one sample's noise, as two unsigned 64-bit words.

    It depends on the run's seed, the sample's id and the number of the draw alone, so the noise is the same
    whatever the batch, the worker or the order. docs/cache-format.md states the same rule in words.
    """
    return _philox_key(f"mmdiff-cache noise 1\0{seed}\0{sample_id}\0{draw}")


def draw_noise(seed: int, sample_id: str, draw: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise in float32, drawn on the CPU in the shape of the unpacked latent [c H/f W/f]."""
    return _normal(noise_key(seed, sample_id, draw), shape)


def draw_start(seed: int, sample_id: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The noise from which a picture is drawn, in the same form as `draw_noise`.

    Its key is another one for the same seed: a picture noised with what it was drawn from would just go back
    along its own path, which no head was trained on.
    """
    return _normal(_philox_key(f"mmdiff-cache start 1\0{seed}\0{sample_id}"), shape)


def _philox_key(text: str) -> tuple[int, int]:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def _normal(key: tuple[int, int], shape: tuple[int, ...]) -> NDArray[np.float32]:
    philox = np.random.Philox(key=np.array(key, dtype=np.uint64))
    return np.random.Generator(philox).standard_normal(shape, dtype=np.float32)
