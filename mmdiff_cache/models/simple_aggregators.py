"""What the token aggregator is compared with: timesteps fused without looking at what a token holds.

None has a transformer, a skip or CBAM; those belong to the token aggregator. Paper: Sec. 4.5, Tab. 5.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mmdiff_cache.config import AggregatorConfig, filled

from .aggregator import Aggregation, Aggregator, Projections, resolve_aggregator, timesteps_first, to_map


class ProjectedAggregator(Aggregator):
    """Anything that begins as the token aggregator does: each timestep normalised and projected."""

    def __init__(
        self, *, channels: int, timesteps: int, width: int, cleanest: int, config: AggregatorConfig
    ) -> None:
        super().__init__()
        norm = filled(resolve_aggregator(config).norm)
        self.projections = Projections(channels, timesteps, width, norm)


@final
class MeanAggregator(ProjectedAggregator):
    """The plain mean over the timesteps."""

    def aggregate(self, features: Float[Tensor, "B T h w C"]) -> Aggregation:
        """The mean, and equal weights."""
        batch, timesteps, rows, columns, _ = features.shape
        fused = torch.stack(self.projections(features)).mean(dim=0)
        weights = torch.full((1, 1, 1, 1), 1 / timesteps, device=features.device)
        return Aggregation(
            fused=to_map(fused, features), weights=weights.expand(batch, timesteps, rows, columns)
        )


@final
class GlobalAggregator(ProjectedAggregator):
    """One learned weight a timestep, the same at every token of every picture.

    The mixing weights of Diffusion Hyperfeatures (Luo et al., 2023); where they differ: docs/paper-notes.md.
    """

    def __init__(
        self, *, channels: int, timesteps: int, width: int, cleanest: int, config: AggregatorConfig
    ) -> None:
        super().__init__(
            channels=channels, timesteps=timesteps, width=width, cleanest=cleanest, config=config
        )
        self.mixing = nn.Parameter(torch.zeros(timesteps))

    def aggregate(self, features: Float[Tensor, "B T h w C"]) -> Aggregation:
        """The weighted sum, and the weights at every token."""
        batch, timesteps, rows, columns, _ = features.shape
        weights = functional.softmax(self.mixing.float(), dim=0)
        fused = (weights[:, None, None] * torch.stack(self.projections(features))).sum(dim=0)
        everywhere = weights.view(1, timesteps, 1, 1).expand(batch, timesteps, rows, columns)
        return Aggregation(fused=to_map(fused, features), weights=everywhere)


@final
class SingleAggregator(ProjectedAggregator):
    """The only timestep, normalised and projected: nothing is fused. `resolve_model` refuses more."""

    def aggregate(self, features: Float[Tensor, "B 1 h w C"]) -> Aggregation:
        """The projection of the only timestep."""
        return Aggregation(fused=to_map(self.projections(features)[0], features), weights=None)


@final
class ConcatAggregator(Aggregator):
    """All timesteps side by side, each with its own LayerNorm, and one projection of T * C channels to D."""

    def __init__(
        self, *, channels: int, timesteps: int, width: int, cleanest: int, config: AggregatorConfig
    ) -> None:
        super().__init__()
        normalised = resolve_aggregator(config).norm == "before_projection"
        self.norms = nn.ModuleList(
            nn.LayerNorm(channels) if normalised else nn.Identity() for _ in range(timesteps)
        )
        self.linear = nn.Linear(timesteps * channels, width)

    def aggregate(self, features: Float[Tensor, "B T h w C"]) -> Aggregation:
        """The projection; nothing says what a timestep counts."""
        tokens = zip(self.norms, timesteps_first(features), strict=True)
        side_by_side = torch.cat([norm(x) for norm, x in tokens], dim=1)
        return Aggregation(fused=to_map(self.linear(side_by_side), features), weights=None)
