"""The model of stage two: an aggregator a layer, concept and discriminative maps beside, a decoder on top.

It is rebuilt from its `ModelSpec`, plain values that a checkpoint stores beside the weights.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdiff_cache.config import AggregatorConfig, Config, DecoderName, filled
from mmdiff_cache.errors import ConfigError

from .aggregator import Aggregator, TokenAggregator, resolve_aggregator
from .decoder import CHANNELS_PER_GROUP, Decoder, resize
from .deeplabv3plus import DeepLabV3Plus
from .dpt import DPT
from .input_layer import InputLayer
from .linear import Linear
from .simple_aggregators import ConcatAggregator, GlobalAggregator, MeanAggregator, SingleAggregator
from .temporal import Block

DECODER_STRIDE = 4
"""Decoders work on a grid of one place for 4 x 4 pixels, as DeepLabV3+ and DPT do on their own backbones."""
WIDEST_DECODER = 256
"""Width of both decoders in references [6] and [37]; with D = 768 it gives the paper's 36 M."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec(Config):
    """Everything that decides the shape of a model, and nothing else; JSON-able like a configuration.

    `MMDiff.from_spec` fills the aggregator's fields and width and the decoder's width where they are None.
    """

    decoder: DecoderName
    out_channels: int
    layers: int
    """L, the number of tapped blocks; the first is the shallowest."""
    channels: int
    """C of the hidden states, or P of the latents."""
    timesteps: int
    cleanest: int
    """Index of the smallest t on the T axis."""
    grid: tuple[int, ...]
    """(h, w), tokens."""
    patch: int
    """Pixels of a token's side: 16 for FLUX.1-dev."""
    concepts: int = 0
    """K, channels of the concept maps; 0 for none."""
    discriminative: tuple[int, ...] = ()
    """Channels of each discriminative feature map."""
    aggregator: AggregatorConfig = field(default_factory=AggregatorConfig)
    decoder_width: int | None = None
    source: Literal["hidden_states", "latents"] = "hidden_states"
    output: Literal["logits", "depth"] = "logits"
    """`depth` makes the output exp(decoder), in metres."""
    typical_depth: float = 1.0
    """Metres that an untrained depth model answers: the geometric mean of the training labels."""
    standardise: bool = False
    """Whether features are shifted and scaled by what the training samples showed."""
    drop_channels: tuple[int, ...] = ()
    """Channels of the features that nothing sees."""

    @property
    def kept_channels(self) -> int:
        """Channels that the aggregators see."""
        return self.channels - len(self.drop_channels)


def resolve_model(spec: ModelSpec) -> ModelSpec:
    """Fill the Nones; raise ConfigError where the paper's constraint D < C or a shape does not hold.

    Latents are not compressed, so D may reach or pass C there, and they are tame, so nothing normalises them.
    """
    _check_name("decoder", spec.decoder, DECODERS)
    _check_name("aggregator.kind", spec.aggregator.kind, AGGREGATORS)
    config = spec.aggregator
    if spec.source == "latents" and config.norm is None:
        config = dataclasses.replace(config, norm="none")
    config = resolve_aggregator(config)
    if config.width is None:
        raise ConfigError("aggregator.width is not given; --set aggregator.width=64, say")
    if spec.source == "hidden_states" and config.width >= spec.kept_channels:
        fitting = max(spec.kept_channels // 2 // config.heads, 1) * config.heads
        raise ConfigError(
            f"aggregator.width must be below the backbone's {spec.kept_channels} channels (Sec. 3.1), "
            f"got {config.width}; --set aggregator.width={fitting}"
        )
    if config.kind == "none" and spec.timesteps != 1:
        raise ConfigError(
            f"aggregator.kind none takes one timestep, got {spec.timesteps}; choose one with --timesteps, or "
            "fuse them with --set aggregator.kind=mean"
        )
    if len(spec.grid) != 2 or min(spec.grid) < 1:
        raise ConfigError(f"grid must be two positive numbers, rows and columns of tokens, got {spec.grid}")
    width = spec.decoder_width or default_decoder_width(config.width)
    return dataclasses.replace(spec, aggregator=config, decoder_width=width)


def _check_name(field: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ConfigError(f"{field} must be one of {', '.join(known)}, got {name!r}")


def default_decoder_width(width: int) -> int:
    """The aggregator's width up to 256, in whole GroupNorm groups."""
    return max(min(width, WIDEST_DECODER) // CHANNELS_PER_GROUP, 1) * CHANNELS_PER_GROUP


def decoder_upsampling(patch: int) -> int:
    """How much finer than the tokens a decoder's grid is: a power of two that comes nearest to stride 4."""
    return 2 ** max(0, round(math.log2(patch / DECODER_STRIDE)))


class MMDiff(nn.Module):
    """Aggregators and decoder, joined. Build it with `from_spec`; the spec says what each input must be."""

    def __init__(self, spec: ModelSpec, aggregators: Sequence[Aggregator], decoder: Decoder) -> None:
        super().__init__()
        self.spec = spec
        self.inputs = InputLayer(
            channels=spec.channels,
            drop=spec.drop_channels,
            statistics=(spec.timesteps, spec.layers) if spec.standardise else None,
        )
        self.aggregators = nn.ModuleList(aggregators)
        self.decoder = decoder

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> "MMDiff":
        """Build the model that a spec describes, with fresh weights; ConfigError if it cannot hold."""
        spec = resolve_model(spec)
        assert spec.aggregator.width is not None
        aggregators = [
            AGGREGATORS[spec.aggregator.kind](
                channels=spec.kept_channels,
                timesteps=spec.timesteps,
                width=spec.aggregator.width,
                cleanest=spec.cleanest,
                config=spec.aggregator,
            )
            for _ in range(spec.layers)
        ]
        decoder = DECODERS[spec.decoder](spec)
        if spec.output == "depth" and decoder.head.bias is not None:
            nn.init.constant_(decoder.head.bias, math.log(spec.typical_depth))
        return cls(spec, aggregators, decoder)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T L h w C"],
        concepts: Float[Tensor, "B K _ _"] | None = None,
        discriminative: Sequence[Float[Tensor, "B _ _ _"]] = (),
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "B out H W"]:
        """Logits, or depth in metres, in float32 at `size` = (H, W); by default grid times patch."""
        self._check_features(tuple(hidden_states.shape[1:]))
        layers = zip(self.aggregators, self.inputs(hidden_states).unbind(dim=2), strict=True)
        features = [self._aggregate(aggregator, x) for aggregator, x in layers]
        rows, columns = self.spec.grid
        size = size or (rows * self.spec.patch, columns * self.spec.patch)
        output = self.decoder(features, self._guidance(concepts, discriminative), size)
        return output.exp() if self.spec.output == "depth" else output

    def compile_blocks(self, compiler: str | Callable[..., Any] = "inductor") -> int:
        """Compile the blocks of the temporal transformers when they are first called; how many will be.

        All of them have one shape, so they share one graph. Dropout draws the same numbers as without;
        results differ by rounding.
        """
        blocks = [module for module in self.aggregators.modules() if isinstance(module, Block)]
        options = {"fallback_random": True} if compiler == "inductor" else None
        for block in blocks:
            block.compile(backend=compiler, options=options)
        return len(blocks)

    def _aggregate(
        self, aggregator: nn.Module, features: Float[Tensor, "B T h w C"]
    ) -> Float[Tensor, "B D h w"]:
        """One layer's fused map; with `aggregator.checkpointing` nothing inside is kept for the gradients."""
        if self.spec.aggregator.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(aggregator, features, use_reentrant=False))
        return aggregator(features)

    def aggregation_weights(
        self, hidden_states: Float[Tensor, "B T L h w C"]
    ) -> Float[Tensor, "B T L h w"] | None:
        """What each timestep counts at each token, layer by layer; 1 in sum over T.

        None for an aggregator that does not weigh timesteps (`concat`, `none`).
        """
        aggregators = cast(Sequence[Aggregator], self.aggregators)
        layers = zip(aggregators, self.inputs(hidden_states).unbind(dim=2), strict=True)
        weights = [aggregator.aggregate(x).weights for aggregator, x in layers]
        known = [x for x in weights if x is not None]
        return torch.stack(known, dim=2) if len(known) == len(weights) else None

    def parameter_counts(self) -> Mapping[str, int]:
        """Trainable parameters of each part: aggregators, decoder, head."""
        head = _count(self.decoder.head)
        return {
            "aggregators": _count(self.aggregators),
            "decoder": _count(self.decoder) - head,
            "head": head,
        }

    def _check_features(self, found: tuple[int, ...]) -> None:
        """Refuse features of another store by their shape; inside they might pass for good ones."""
        spec = self.spec
        expected = (spec.timesteps, spec.layers, *spec.grid, spec.channels)
        if found != expected:
            raise ConfigError(
                f"the model was built for features [T L h w C] of {list(expected)}, got {list(found)}; "
                "read the timesteps and layers that it was trained on"
            )

    def _guidance(
        self, concepts: Float[Tensor, "B K _ _"] | None, discriminative: Sequence[Float[Tensor, "B _ _ _"]]
    ) -> Float[Tensor, "B G h w"] | None:
        """Concept maps and discriminative features on the token grid, side by side. Paper: Sec. 3.3."""
        maps = [*([] if concepts is None else [concepts]), *discriminative]
        found = [x.shape[1] for x in maps]
        expected = [*([self.spec.concepts] if self.spec.concepts else []), *self.spec.discriminative]
        if found != expected:
            raise ConfigError(f"the model was built for guidance maps of {expected} channels, got {found}")
        rows, columns = self.spec.grid
        return torch.cat([resize(x.float(), (rows, columns)) for x in maps], dim=1) if maps else None


def _sizes(spec: ModelSpec) -> dict[str, int]:
    """What every decoder is told: how many layers, how wide, how many guidance and output channels."""
    return {
        "layers": spec.layers,
        "features": filled(spec.aggregator.width),
        "guidance": spec.concepts + sum(spec.discriminative),
        "out_channels": spec.out_channels,
    }


def _deeplabv3plus(spec: ModelSpec) -> Decoder:
    width, upsampling = filled(spec.decoder_width), decoder_upsampling(spec.patch)
    return DeepLabV3Plus(**_sizes(spec), width=width, grid=min(spec.grid), upsampling=upsampling)


def _dpt(spec: ModelSpec) -> Decoder:
    return DPT(**_sizes(spec), width=filled(spec.decoder_width), upsampling=decoder_upsampling(spec.patch))


def _linear(spec: ModelSpec) -> Decoder:
    return Linear(**_sizes(spec))


DECODERS: dict[str, Callable[[ModelSpec], Decoder]] = {
    "deeplabv3plus": _deeplabv3plus,
    "dpt": _dpt,
    "linear": _linear,
}
"""Every decoder by name; a new one is a file with its class and a line here."""

AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "token": TokenAggregator,
    "mean": MeanAggregator,
    "concat": ConcatAggregator,
    "global": GlobalAggregator,
    "none": SingleAggregator,
}
"""Every aggregator by `aggregator.kind`; a new one is a file with its class and a line here."""


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
