"""The choices of stage two."""

from dataclasses import dataclass, field
from typing import Literal

from .base import Config, require

Source = Literal["hidden_states", "latents", "images", "discriminative"]
"""What stage two takes for the features of a sample."""
VariantUse = Literal["augment", "stack"]
DecoderName = str
"""A name in models.mmdiff.DECODERS."""


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
    weighing: Literal["learned", "equal"] = "learned"
    """A control: `equal` gives every timestep the same weight at every token, and leaves all else."""
    checkpointing: bool = False
    """Keep less memory in training: each layer's aggregator is computed a second time for its gradients."""

    def __post_init__(self) -> None:
        for name in ("width", "heads", "mlp_ratio"):
            value = getattr(self, name)
            require(value is None or value > 0, f"aggregator.{name} must be positive, got {value}")
        require(self.depth >= 0, f"aggregator.depth must not be negative, got {self.depth}")
        require(0.0 <= self.dropout < 1.0, f"aggregator.dropout must lie in [0, 1), got {self.dropout:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig(Config):
    """Exponential moving average of the weights (Paper: Sec. 3.4, beta 0.999)."""

    beta: float = 0.999
    warmup: bool = True
    """beta_n = min(beta, (1 + n) / (10 + n)); False keeps beta constant."""

    def __post_init__(self) -> None:
        require(0.0 <= self.beta <= 1.0, f"ema.beta must lie in [0, 1], got {self.beta:g}")


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
            require(values is None or len(values) > 0, f"concept_maps.{name} must not be empty")
        require(
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
        self._check_tasks()
        self._check_choices()
        self._check_numbers()
        require(
            self.patience is None or self.holdout > 0,
            f"patience needs held-out samples to watch, got holdout=0; --set holdout=0.1, "
            f"or leave out patience={self.patience}",
        )
        require(
            self.batch_size is None or self.accumulate <= self.batch_size,
            f"accumulate must be at most batch_size ({self.batch_size}), got {self.accumulate}",
        )

    def _check_tasks(self) -> None:
        """What several tasks alone can have."""
        tasks = self.task.count("+") + 1
        require(not self.disjoint or tasks > 1, "disjoint deals samples to several tasks, got one")
        for name in ("mixing", "loss_weights"):
            shares = getattr(self, name)
            require(shares is None or tasks > 1, f"{name} is of several tasks, got one; leave it out")
            require(
                shares is None or (len(shares) == tasks and min(shares) > 0 and max(shares) < float("inf")),
                f"{name} needs a positive number for each of the {tasks} tasks, got {shares}",
            )

    def _check_choices(self) -> None:
        """What is read of a sample."""
        for t in self.timesteps or ():
            require(0.0 <= t <= 1.0, f"timesteps lie in [0, 1] (1 = pure noise), got {t:g}")
        for name in ("timesteps", "layers", "variants"):
            values = getattr(self, name)
            require(values is None or len(values) > 0, f"{name} must not be empty")
        for channel in self.drop_channels:
            require(channel >= 0, f"drop_channels are counted from 0, got {channel}")

    def _check_numbers(self) -> None:
        """Numbers and their ranges."""
        for name in (
            "steps", "batch_size", "limit", "decoder_width", "clip", "accumulate", "checks", "patience",
            "balance_steps",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive, got {value}")
        rate = self.learning_rate
        require(0.0 < rate < float("inf"), f"learning_rate must be positive, got {rate:g}")
        for name in ("weight_decay", "decoder_rate"):
            value = getattr(self, name)
            require(0.0 <= value < float("inf"), f"{name} must not be negative, got {value:g}")
        require(0.0 <= self.holdout < 1.0, f"holdout must lie in [0, 1), got {self.holdout:g}")
        for name in ("seed", "order_seed", "subset_seed"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 2**64, f"{name} must be 0 to 2^64 - 1, got {value}")

    @property
    def reading_seed(self) -> int:
        """Seed of the order of samples and of their variants: `order_seed`, or that of the run."""
        return self.seed if self.order_seed is None else self.order_seed
