"""The choices of stage one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .base import Config, require

NoiseForm = Literal["flow", "vp"]
Fit = Literal["squash", "pad", "crop"]
"""How a picture becomes the square that the network takes; see fitting."""
CaptureMode = Literal["trajectory", "renoise", "nearest"]
Codec = Literal["zstd", "fast", "int8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseConfig(Config):
    """How a clean latent is noised.

    `flow`: x_t = (1-t) x_0 + t eps; `vp`: the paper's Eq. 1 with alpha_t = 1-t.
    """

    form: NoiseForm = "flow"
    seed: int = 0
    shared: bool = True
    """One noise for all timesteps of a sample; False gives timestep number j a draw of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig(Config):
    """How pictures are drawn from prompts, and when their features are captured.

    `renoise`: draw, then noise the final latent at each t like that of a real picture, which is what heads
    are trained on. `trajectory`: insert every t into the sampler's schedule and capture while drawing, the
    paper's single pass; the picture is another one than without them. `nearest`: capture while drawing, at
    the step of the unchanged schedule that is nearest to t.
    """

    mode: CaptureMode = "renoise"
    steps: int | None = None
    """Steps of the sampler, before any is inserted; by default the backbone's."""
    guidance: float | None = None
    """Distilled guidance while drawing; by default that of the captured passes."""
    true_cfg_scale: float | None = None
    """Classifier-free guidance with a second pass of the model; 1 is without. By default the backbone's."""
    negative_prompt: str | None = None
    """What that second pass is told; by default nothing."""
    inserted: tuple[float, ...] | None = None
    """Noise levels put into the schedule in mode `trajectory`; by default the timesteps."""
    seed: int = 0
    """Of the noise that pictures are drawn from, where a prompt has no seed of its own."""

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps > 0, f"generation.steps must be positive, got {self.steps}")
        scale = self.true_cfg_scale
        require(
            scale is None or scale >= 1, f"generation.true_cfg_scale must be at least 1, got {scale or 0:g}"
        )
        require(0 <= self.seed < 2**63, f"generation.seed must lie between 0 and 2^63 - 1, got {self.seed}")

    @property
    def contrasts(self) -> bool:
        """Whether there is a second pass to steer away from (true classifier-free guidance)."""
        return self.true_cfg_scale is not None and self.true_cfg_scale > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig(Config):
    """Stage one: which pictures, which backbone, what is captured, where it goes."""

    dataset: str = "scenes"
    data_root: str | None = None
    """Folder of the data set's files; `scenes` needs none."""
    splits: tuple[str, ...] | None = None
    limit: int | None = None
    """The first N samples of every split."""
    prompts: str = "empty"
    """`empty`, a kind that the data set knows (`scene`, `oracle`), or a JSONL file of {sample_id, prompt}.
    For the data set `prompts`, the file of what is to be drawn: one prompt a line, or JSONL.
    """
    backbone: str | None = None
    """A name of the registry, a folder in diffusers' format, or a repository of the hub (`org/name`)."""
    layers: tuple[str, ...] | None = None
    """Block addresses such as `single.4` or `double.2`."""
    timesteps: tuple[float, ...] | None = None
    """t in [0, 1], 1 = pure noise."""
    concepts: Mapping[str, tuple[str, ...]] | None = None
    """Concept vocabularies by name."""
    discriminative: tuple[str, ...] = ()
    """Encoders whose features are stored beside: names such as `dinov3-vitb16`, or folders."""
    cross_attention: bool = False
    """Whether the averaged attention of image to text is kept too, a map a double block (Paper: Tab. 5)."""
    resolution: int | None = None
    """Side of the square network input, in pixels."""
    fit: Fit = "squash"
    """How a picture becomes that square: `squash`, `pad` or `crop`."""
    guidance: float | None = None
    text_length: int | None = None
    """Tokens of the T5 prompt."""
    dtype: Literal["float32", "bfloat16"] | None = None
    quantisation: Literal["none", "float8"] | None = None
    """`float8` halves the memory of a bfloat16 transformer's weights, and changes its features."""
    device: str = "auto"
    attention: str | None = None
    """A backend of diffusers, such as `native`, `flash` or `xformers`; tried out before the run."""
    compile: bool | None = None
    """Compile the transformer's blocks; by default on a GPU. Changes features by rounding."""
    text_pass: Literal["together", "first"] | None = None
    """Text encoders loaded with the transformer, or before it and alone; by default as memory allows."""
    batch_size: int | None = None
    """Samples a forward pass; all timesteps of a sample go in one batch."""
    partition_size: int | None = None
    """Samples a unit of work and of redo; a multiple of the batch size."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    draws: int = 1
    """Noise draws of every sample; each multiplies time and size."""
    flip: bool = False
    """Whether each draw is also taken of the mirrored picture; left and right change places in its prompt."""
    generation: GenerationConfig | None = None
    """For the data set `prompts` alone."""
    codec: Codec = "zstd"
    """`zstd` (lossless), `fast` (lz4, lossless and larger), `int8` (about 0.5 % off, half the bytes)."""
    store: str | None = None
    """Folder of the store; data/<dataset>/<backbone> (or under $MMDIFF_DATA) by default."""

    def __post_init__(self) -> None:
        for t in self.timesteps or ():
            require(0.0 <= t <= 1.0, f"timesteps lie in [0, 1] (1 = pure noise), got {t:g}")
        for name in ("timesteps", "layers", "splits"):
            values = getattr(self, name)
            require(values is None or len(values) > 0, f"{name} must not be empty")
            require(values is None or len(set(values)) == len(values), f"{name} repeats a value: {values}")
        for name in ("limit", "resolution", "batch_size", "partition_size", "text_length", "draws"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive, got {value}")
        if self.partition_size is not None and self.batch_size is not None:
            require(
                self.partition_size % self.batch_size == 0,
                f"partition_size must be a multiple of batch_size, got {self.partition_size} "
                f"and {self.batch_size}",
            )
        require(
            not (self.compile and self.quantisation == "float8"),
            "float8 weights are cast layer by layer, which cannot be compiled; leave out --compile",
        )
        for vocabulary, words in (self.concepts or {}).items():
            require(
                len(words) > 1,
                f"concept vocabulary {vocabulary!r} needs at least two words, got {list(words)}",
            )
            require(len(set(words)) == len(words), f"concept vocabulary {vocabulary!r} repeats a word")
