"""Token aggregation: T feature maps of one layer become one, by weights that vary from token to token.

Every token position is a sequence of T timesteps on its own; positions never see each other until CBAM.
Steps: normalise and project each timestep, run a small transformer over time, predict one weight a timestep,
sum, add the cleanest timestep back, refine with CBAM. App. F and Sec. 3.1 of the paper differ in the details;
`AggregatorConfig` has both readings as presets and each detail as a field (docs/paper-notes.md). What it is
compared with is in `simple_aggregators`.
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mmdiff_cache.config import AggregatorConfig
from mmdiff_cache.errors import ConfigError

from .cbam import CBAM
from .temporal import TemporalTransformer

GATE_INIT = 0.1
"""Start of the learnable scalar on the gated skip (Paper: App. F)."""
HEAD_STD = 0.02
"""The weight head starts small, so that all timesteps start with nearly equal weights."""

PRESETS: dict[str, dict[str, Any]] = {
    "appendix_f": {
        "layer_scale": 1e-6,
        "norm": "before_projection",
        "skip": "gated",
        "cbam": "after_skip",
        "weights_on": "transformed",
    },
    "section_3_1": {
        "layer_scale": 1e-4,
        "norm": "after_projection",
        "skip": "plain",
        "cbam": "before_skip",
        "weights_on": "projected",
    },
}
"""The two readings of the paper, as values for the fields that a configuration leaves at None."""


def resolve_aggregator(config: AggregatorConfig) -> AggregatorConfig:
    """Fill every None but the width from the preset; the width is the backbone's to give.

    Raises ConfigError for a norm after the projection where timesteps are not projected one by one.
    """
    if config.kind == "concat" and config.norm is None:
        config = dataclasses.replace(config, norm="before_projection")
    if config.kind == "concat" and config.norm == "after_projection":
        raise ConfigError(
            "aggregator.kind concat normalises each timestep before their common projection, "
            "got aggregator.norm after_projection; take before_projection or none"
        )
    preset = PRESETS[config.preset]
    return dataclasses.replace(config, **{k: v for k, v in preset.items() if getattr(config, k) is None})


@dataclass(frozen=True, kw_only=True, slots=True)
class Aggregation:
    """What the aggregator makes of one layer."""

    fused: Float[Tensor, "B D h w"]
    weights: Float[Tensor, "B T h w"] | None
    """Positive, and 1 in sum over T at every token; None where nothing weighs the timesteps."""


class TimestepProjection(nn.Module):
    """One timestep's LayerNorm and 1 x 1 projection, C channels to D."""

    def __init__(self, channels: int, width: int, norm: str) -> None:
        super().__init__()
        self.before = nn.LayerNorm(channels) if norm == "before_projection" else nn.Identity()
        self.linear = nn.Linear(channels, width)
        self.after = nn.LayerNorm(width) if norm == "after_projection" else nn.Identity()

    def forward(self, tokens: Float[Tensor, "M C"]) -> Float[Tensor, "M D"]:
        """Tokens of one timestep, projected."""
        return self.after(self.linear(self.before(tokens)))


class Projections(nn.ModuleList):
    """A LayerNorm and a projection of its own for each timestep (Paper: App. F)."""

    def __init__(self, channels: int, timesteps: int, width: int, norm: str) -> None:
        super().__init__(TimestepProjection(channels, width, norm) for _ in range(timesteps))

    def forward(self, features: Float[Tensor, "B T h w C"]) -> list[Float[Tensor, "M D"]]:
        """F_proj of each timestep, with all positions of the batch, M = B h w, in one axis."""
        return [project(x) for project, x in zip(self, timesteps_first(features), strict=True)]


def timesteps_first(features: Float[Tensor, "B T h w C"]) -> Float[Tensor, "T M C"]:
    """Features as tokens of each timestep, in float32: float16 is how they are stored, not computed with."""
    tokens = features.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    return tokens.flatten(1, 3)


def to_map(tokens: Float[Tensor, "M D"], features: Float[Tensor, "B T h w C"]) -> Float[Tensor, "B D h w"]:
    """Tokens back at the places that they have in the features."""
    batch, _, rows, columns, _ = features.shape
    return cast(Tensor, TokenGradients.apply(tokens.unflatten(0, (batch, rows, columns)).permute(0, 3, 1, 2)))


class TokenGradients(torch.autograd.Function):
    """The map itself; its gradient is laid out token by token.

    A decoder's gradients come channel by channel, and whatever adds or multiplies gradients keeps their
    layout; so all that lies before would be done across memory instead of along it.
    """

    @staticmethod
    def forward(ctx: Any, features: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """The same values."""
        return features.view_as(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:  # pyright: ignore
        """The same gradients, channels last."""
        return grad.contiguous(memory_format=torch.channels_last)


class Aggregator(nn.Module, ABC):
    """Anything that fuses the T timesteps of one layer and says what each of them counted."""

    @abstractmethod
    def aggregate(self, features: Float[Tensor, "B T h w C"]) -> Aggregation:
        """The fused map together with the weights that made it."""

    def forward(self, features: Float[Tensor, "B T h w C"]) -> Float[Tensor, "B D h w"]:
        """The fused map; float16 features from the cache are computed in float32."""
        return self.aggregate(features).fused


class TokenAggregator(Aggregator):
    """Fuses the T timesteps of one layer (Paper: Sec. 3.1, Eq. 2; App. F, Fig. 8).

    `channels` is C, `width` is D, `cleanest` the index of the smallest t. T = 1 is allowed: its weight is 1.
    Raises ConfigError if the heads do not divide the width.
    """

    def __init__(
        self, *, channels: int, timesteps: int, width: int, cleanest: int, config: AggregatorConfig
    ) -> None:
        super().__init__()
        config = resolve_aggregator(config)
        if width % config.heads:
            raise ConfigError(
                f"aggregator.width must be a multiple of aggregator.heads, got {width} and {config.heads}"
            )
        if not 0 <= cleanest < timesteps:
            raise ConfigError(f"the cleanest timestep must be one of {timesteps}, got index {cleanest}")
        assert config.layer_scale is not None
        assert config.norm is not None
        self.config, self.cleanest = config, cleanest
        self.projections = Projections(channels, timesteps, width, config.norm)
        self.transformer = TemporalTransformer(
            timesteps=timesteps,
            width=width,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            dropout=config.dropout,
            layer_scale=config.layer_scale,
        )
        self.weight_head = nn.Linear(width, 1) if config.weighing == "learned" else None
        if self.weight_head is not None:
            nn.init.normal_(self.weight_head.weight, std=HEAD_STD)
            nn.init.zeros_(self.weight_head.bias)
        gated = config.skip == "gated"
        self.gate = nn.Parameter(torch.tensor(GATE_INIT)) if gated else None
        self.skip_projection = nn.Linear(width, width) if gated else None
        self.cbam = CBAM(width)

    def aggregate(self, features: Float[Tensor, "B T h w C"]) -> Aggregation:
        """The fused map together with the weights that made it."""
        timesteps = self.projections(features)
        projected = torch.stack(timesteps)
        transformed = self.transformer(projected)
        weights = self._weigh(transformed)
        values = transformed if self.config.weights_on == "transformed" else projected
        fused, skip = (weights * values).sum(dim=0), self._skip(timesteps[self.cleanest])
        if self.config.cbam == "after_skip":
            refined = self.cbam(to_map(fused + skip, features))
        else:
            refined = self.cbam(to_map(fused, features)) + to_map(skip, features)
        batch, _, rows, columns, _ = features.shape
        return Aggregation(
            fused=refined, weights=weights.squeeze(-1).unflatten(1, (batch, rows, columns)).transpose(0, 1)
        )

    def _weigh(self, transformed: Float[Tensor, "T M D"]) -> Float[Tensor, "T M 1"]:
        if self.weight_head is None:
            return transformed.new_full((*transformed.shape[:2], 1), 1 / len(transformed))
        return functional.softmax(self.weight_head(transformed).float(), dim=0)

    def _skip(self, cleanest: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        if self.gate is None or self.skip_projection is None:
            return cleanest
        return self.gate * self.skip_projection(cleanest)
