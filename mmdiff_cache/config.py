"""What a person chooses, as frozen values: each checks itself and goes to JSON and back.

None means 'the default of the data set, the backbone or the task'. `resolve` (extraction.plan, training.run)
fills every None; only resolved configurations are stored.
"""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import ConfigError

NoiseForm = Literal["flow", "vp"]
Fit = Literal["squash", "pad", "crop"]
"""How a picture becomes the square that the network takes; see fitting."""
CaptureMode = Literal["trajectory", "renoise", "nearest"]
Codec = Literal["zstd", "fast", "int8"]
Source = Literal["hidden_states", "latents", "images", "discriminative"]
"""What stage two takes for the features of a sample."""
VariantUse = Literal["augment", "stack"]
DecoderName = str
"""A name in models.mmdiff.DECODERS."""
T = TypeVar("T")
C = TypeVar("C", bound="Config")


def data_folder() -> Path:
    """Where stores lie by default: $MMDIFF_DATA, or data/ in the current folder."""
    return Path(os.environ.get("MMDIFF_DATA") or "data")


class Config:
    """Base of all configurations: JSON, dotted overrides, one error for every wrong field."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; tuples become lists, paths become text."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=os.fspath))  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[C], values: Mapping[str, Any]) -> C:
        """Build from JSON values. Raises ConfigError on an unknown key or a value of the wrong type."""
        return typing.cast(C, _build(cls, values, where=cls.__name__))

    def override(self: C, assignments: Mapping[str, str]) -> C:
        """Apply `--set` assignments such as `{"aggregator.layer_scale": "1e-4"}`: JSON or bare text."""
        values = self.to_json()
        for dotted, text in assignments.items():
            node, *parents = values, *dotted.split(".")[:-1]
            for parent in parents:
                if parent in node and node[parent] is None:  # a group that was left to its defaults
                    node[parent] = {}
                if not isinstance(node.get(parent), dict):
                    raise ConfigError(f"--set {dotted}: {type(self).__name__} has no group {parent!r}")
                node = node[parent]
            node[dotted.split(".")[-1]] = _parse_text(text)
        return type(self).from_json(values)


def _parse_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.split(",") if "," in text else text


def _build(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{where} has no field {unknown[0]!r}; its fields are {', '.join(fields)}")
    missing = [name for name, f in fields.items() if name not in values and _has_no_default(f)]
    if missing:
        raise ConfigError(f"{where} needs a value for {missing[0]!r}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _has_no_default(field_: "dataclasses.Field[Any]") -> bool:
    return field_.default is dataclasses.MISSING and field_.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Turn a JSON value into what a field's annotation says, or raise a ConfigError that names the field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r}")
    if origin is tuple:
        items = [value] if isinstance(value, (str, int, float)) else value
        if arguments[0] in (int, float):  # '0.26,0.52' was split, not read: block addresses may be numbers
            items = [_parse_text(item) if isinstance(item, str) else item for item in items]
        return tuple(_convert(arguments[0], item, where) for item in items)
    if origin in (dict, Mapping):
        return {key: _convert(arguments[1], item, where) for key, item in dict(value).items()}
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(typing.cast(type, hint), value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, Path):
        return str(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def filled(value: T | None) -> T:
    """A field of a resolved configuration; `resolve` leaves None only where None has a meaning of its own."""
    assert value is not None
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


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
        _require(self.steps is None or self.steps > 0, f"generation.steps must be positive, got {self.steps}")
        scale = self.true_cfg_scale
        _require(
            scale is None or scale >= 1, f"generation.true_cfg_scale must be at least 1, got {scale or 0:g}"
        )
        _require(0 <= self.seed < 2**63, f"generation.seed must lie between 0 and 2^63 - 1, got {self.seed}")

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
            _require(0.0 <= t <= 1.0, f"timesteps lie in [0, 1] (1 = pure noise), got {t:g}")
        for name in ("timesteps", "layers", "splits"):
            values = getattr(self, name)
            _require(values is None or len(values) > 0, f"{name} must not be empty")
            _require(values is None or len(set(values)) == len(values), f"{name} repeats a value: {values}")
        for name in ("limit", "resolution", "batch_size", "partition_size", "text_length", "draws"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be positive, got {value}")
        if self.partition_size is not None and self.batch_size is not None:
            _require(
                self.partition_size % self.batch_size == 0,
                f"partition_size must be a multiple of batch_size, got {self.partition_size} "
                f"and {self.batch_size}",
            )
        _require(
            not (self.compile and self.quantisation == "float8"),
            "float8 weights are cast layer by layer, which cannot be compiled; leave out --compile",
        )
        for vocabulary, words in (self.concepts or {}).items():
            _require(
                len(words) > 1,
                f"concept vocabulary {vocabulary!r} needs at least two words, got {list(words)}",
            )
            _require(len(set(words)) == len(words), f"concept vocabulary {vocabulary!r} repeats a word")


@dataclass(frozen=True, kw_only=True, slots=True)
class AggregatorConfig(Config):
    """How timesteps become one map. None takes the preset's reading of the paper (docs/paper-notes.md)."""

    kind: str = "token"
    """`token` is the paper's; `mean`, `concat`, `global` and `none` are compared with it, and use `width` and
    `norm` alone.
    """
    preset: Literal["appendix_f", "section_3_1"] = "appendix_f"
    width: int | None = None
    """D; by default the backbone's (768 for FLUX.1-dev)."""
    depth: int = 3
    heads: int = 8
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    layer_scale: float | None = None
    norm: Literal["before_projection", "after_projection", "none"] | None = None
    """Where each timestep's features are normalised; `none` for an ablation and for tame latents."""
    skip: Literal["gated", "plain"] | None = None
    cbam: Literal["after_skip", "before_skip"] | None = None
    weights_on: Literal["transformed", "projected"] | None = None
    """What the per-pixel weights multiply: the transformer's outputs or the projected features."""
    checkpointing: bool = False
    """Keep less memory in training: each layer's aggregator is computed a second time for its gradients."""

    def __post_init__(self) -> None:
        for name in ("width", "heads", "mlp_ratio"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"aggregator.{name} must be positive, got {value}")
        _require(self.depth >= 0, f"aggregator.depth must not be negative, got {self.depth}")
        _require(0.0 <= self.dropout < 1.0, f"aggregator.dropout must lie in [0, 1), got {self.dropout:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig(Config):
    """Exponential moving average of the weights (Paper: Sec. 3.4, beta 0.999)."""

    beta: float = 0.999
    warmup: bool = True
    """beta_n = min(beta, (1 + n) / (10 + n)); False keeps beta constant."""

    def __post_init__(self) -> None:
        _require(0.0 <= self.beta <= 1.0, f"ema.beta must lie in [0, 1], got {self.beta:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConceptMapsConfig(Config):
    """How stored concept scores, or averaged cross-attention, become the maps beside the features."""

    blocks: tuple[str, ...] | None = None
    """Stored double blocks; by default those that the store's own maps average."""
    timesteps: tuple[float, ...] | None = None
    """By default those whose features are read."""
    temperature: float = 1.0
    """Scores are divided by it before the softmax; above 1 the maps are softer."""
    reading: Literal["softmax_then_mean", "mean_then_softmax"] = "softmax_then_mean"
    """Whether blocks and timesteps are averaged as shares (Paper: Sec. 3.2) or as scores."""
    shuffled: bool = False
    """A control: every sample gets the maps of another one."""

    def __post_init__(self) -> None:
        for name in ("blocks", "timesteps"):
            values = getattr(self, name)
            _require(values is None or len(values) > 0, f"concept_maps.{name} must not be empty")
        _require(
            0 < self.temperature < float("inf"),
            f"concept_maps.temperature must be positive, got {self.temperature:g}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Config):
    """Stage two: which task, from which stores, which of the stored features, which decoder, how long."""

    task: str
    """One task, or several that share a model, as in `segmentation+depth` (Paper: App. C)."""
    label: str | None = None
    """A label set of the task's kind; the task's own by default."""
    stores: tuple[str, ...] = ()
    """Folders; empty means the only store under data/ that has the labels."""
    run: str | None = None
    """Folder of the run; runs/<task>-<dataset>-<backbone>-<n> by default."""
    source: Source = "hidden_states"
    """`discriminative` takes the features of the one encoder named there alone. Baselines: `latents` gives
    the heads the clean VAE latent instead of the transformer's features, `images` trains a small U-Net on
    the pictures.
    """
    layers: tuple[str, ...] | None = None
    """Stored blocks; of the encoder where the source is `discriminative`."""
    timesteps: tuple[float, ...] | None = None
    """A value that is given n times is read once and used n times."""
    variants: tuple[int, ...] | None = None
    """Stored variants (noise draw, mirrored or not) that training uses; by default all."""
    variant_use: VariantUse = "augment"
    """`augment`: one variant of a sample an epoch; evaluation takes the first that is not mirrored. `stack`:
    the noise draws stand beside each other as timesteps, in evaluation too.
    """
    concepts: str | None = None
    """A stored vocabulary, `cross_attention` or `none`; by default the task's own vocabulary."""
    concept_maps: ConceptMapsConfig = field(default_factory=ConceptMapsConfig)
    discriminative: tuple[str, ...] = ()
    """Stored discriminative features to concatenate."""
    standardise: bool = False
    """Shift and scale every channel of every timestep and layer to mean 0 and deviation 1, by the training
    samples.
    """
    drop_channels: tuple[int, ...] = ()
    """Channels of the features that are left out, counted from 0."""
    aggregator: AggregatorConfig = field(default_factory=AggregatorConfig)
    decoder: DecoderName | None = None
    decoder_width: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float = 1e-4
    decoder_rate: float = 0.5
    """The decoder's learning rate as a share of `learning_rate` (Paper: Sec. 3.4)."""
    weight_decay: float = 0.01
    mixing: tuple[float, ...] | None = None
    """Of several tasks: the ratio of their batches, in their order; equal by default."""
    disjoint: bool = False
    """Of several tasks with one store: deal the samples out, so that each serves one task alone."""
    loss_weights: tuple[float, ...] | None = None
    """Of several tasks: what each loss counts; by default 1 / its mean over its first `balance_steps`."""
    balance_steps: int = 50
    clip: float | None = None
    """Longest gradient, by its norm over all parameters; a longer one is scaled down to it."""
    accumulate: int = 1
    """Parts in which a step's samples are computed one after the other; the gradient is that of the whole."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    holdout: float = 0.1
    """Share of the training split that picks the best checkpoint and is never trained on."""
    checks: int = 10
    """Times in a training that the held-out samples are scored and a checkpoint is written."""
    patience: int | None = None
    """Checks without a better held-out score after which a training stops; by default it never does. The
    learning rate follows the full length all the same.
    """
    limit: int | None = None
    """Samples of the training split, held-out ones among them: the first N of a permutation of it."""
    subset_seed: int = 0
    """Of that permutation, which also says what is held out."""
    seed: int = 0
    order_seed: int | None = None
    """Seed of the order in which samples come, and of the variants drawn; by default that of the run. Runs
    with the same one can share a reading (docs/sweeps.md).
    """
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool | None = None
    """Compile the aggregators' blocks; by default on CUDA alone. Results differ by rounding."""
    memory: int = 2 * 1024**3
    """Bytes of decoded samples that are kept, so that a small store is read only once; 0 keeps none."""

    def __post_init__(self) -> None:
        for t in self.timesteps or ():
            _require(0.0 <= t <= 1.0, f"timesteps lie in [0, 1] (1 = pure noise), got {t:g}")
        tasks = self.task.count("+") + 1
        _require(not self.disjoint or tasks > 1, "disjoint deals samples to several tasks, got one")
        for name in ("mixing", "loss_weights"):
            shares = getattr(self, name)
            _require(
                shares is None or (len(shares) == tasks and min(shares) > 0),
                f"{name} needs a positive number for each of the {tasks} tasks, got {shares}",
            )
        for name in ("timesteps", "layers", "variants"):
            values = getattr(self, name)
            _require(values is None or len(values) > 0, f"{name} must not be empty")
        for channel in self.drop_channels:
            _require(channel >= 0, f"drop_channels are counted from 0, got {channel}")
        _require(self.subset_seed >= 0, f"subset_seed must not be negative, got {self.subset_seed}")
        for name in (
            "steps", "batch_size", "limit", "decoder_width", "clip", "accumulate", "checks", "patience",
            "balance_steps",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be positive, got {value}")
        _require(0.0 <= self.holdout < 1.0, f"holdout must lie in [0, 1), got {self.holdout:g}")
        _require(
            self.patience is None or self.holdout > 0,
            f"patience needs held-out samples to watch, got holdout=0; --set holdout=0.1, "
            f"or leave out patience={self.patience}",
        )
        _require(
            self.batch_size is None or self.accumulate <= self.batch_size,
            f"accumulate must be at most batch_size ({self.batch_size}), got {self.accumulate}",
        )
        _require(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate:g}")

    @property
    def reading_seed(self) -> int:
        """Seed of the order of samples and of their variants: `order_seed`, or that of the run."""
        return self.seed if self.order_seed is None else self.order_seed
