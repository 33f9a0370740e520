"""One model for several tasks: aggregators and decoder are shared, each task has rows of the head of its own.

Paper: App. C, "a single decoder can serve multiple tasks". A head is a 1 x 1 convolution, so the heads of all
tasks are one convolution whose output channels are dealt out among them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor, nn

from mmdiff_cache.config import Config
from mmdiff_cache.errors import ConfigError

from .mmdiff import MMDiff, ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Head(Config):
    """What one task has of its own."""

    task: str
    channels: int
    output: Literal["logits", "depth"] = "logits"
    """`depth` makes the output exp(decoder), in metres."""
    typical_depth: float = 1.0
    """Metres that an untrained depth head answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnifiedSpec(Config):
    """The shape of a unified model."""

    trunk: ModelSpec
    """What is shared; its output channels are those of all heads, in order."""
    heads: tuple[Head, ...]

    @classmethod
    def join(cls, specs: Mapping[str, ModelSpec]) -> "UnifiedSpec":
        """From the spec that each task would have alone. ConfigError where more than the head differs."""
        heads = tuple(
            Head(task=task, channels=one.out_channels, output=one.output, typical_depth=one.typical_depth)
            for task, one in specs.items()
        )
        bare = {task: _headless(one) for task, one in specs.items()}
        first, *others = bare
        for other in others:
            for entry in dataclasses.fields(ModelSpec):
                have, want = getattr(bare[first], entry.name), getattr(bare[other], entry.name)
                if have != want:
                    raise ConfigError(
                        f"one model for {first} and {other} needs the same {entry.name}, "
                        f"their stores give {have} and {want}"
                    )
        channels = sum(head.channels for head in heads)
        return cls(trunk=dataclasses.replace(bare[first], out_channels=channels), heads=heads)


def _headless(spec: ModelSpec) -> ModelSpec:
    return dataclasses.replace(spec, out_channels=1, output="logits", typical_depth=1.0)


@final
class Unified(nn.Module):
    """The shared model; `for_task` is what trains and predicts."""

    def __init__(self, spec: UnifiedSpec) -> None:
        super().__init__()
        self.trunk = MMDiff.from_spec(spec.trunk)
        self.spec = dataclasses.replace(spec, trunk=self.trunk.spec)
        bias = self.trunk.decoder.head.bias
        for head in spec.heads:
            if head.output == "depth" and bias is not None:
                nn.init.constant_(bias.detach()[self.for_task(head.task).rows], math.log(head.typical_depth))

    def for_task(self, task: str) -> "OneTask":
        """The model as it serves one task, with the weights that all share. ConfigError for another task."""
        before = 0
        for head in self.spec.heads:
            if head.task == task:
                return OneTask(self, head, slice(before, before + head.channels))
            before += head.channels
        names = ", ".join(head.task for head in self.spec.heads)
        raise ConfigError(f"the model was trained for {names}, not for {task!r}")

    def parameter_counts(self) -> Mapping[str, int]:
        """Trainable parameters of each part; `head` counts those of all tasks."""
        return self.trunk.parameter_counts()


@final
class OneTask(nn.Module):
    """A unified model as it serves one task: called like the model that the task would have alone."""

    def __init__(self, unified: Unified, head: Head, rows: slice) -> None:
        super().__init__()
        self.unified, self.head, self.rows = unified, head, rows

    def forward(
        self,
        hidden_states: Float[Tensor, "B T L h w C"],
        concepts: Float[Tensor, "B K h w"] | None = None,
        discriminative: Sequence[Float[Tensor, "B _ _ _"]] = (),
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "B out H W"]:
        """The task's logits, or depth in metres, in float32 at `size` = (H, W); see MMDiff."""
        output = self.unified.trunk(hidden_states, concepts, discriminative, size)[:, self.rows]
        return output.exp() if self.head.output == "depth" else output

    def aggregation_weights(
        self, hidden_states: Float[Tensor, "B T L h w C"]
    ) -> Float[Tensor, "B T L h w"] | None:
        """What each timestep counts at each token; the same for all tasks. See MMDiff."""
        return self.unified.trunk.aggregation_weights(hidden_states)
