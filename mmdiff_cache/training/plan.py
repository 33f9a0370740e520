"""What a training is going to be, said before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.loader import NO_CONCEPTS
from mmdiff_cache.tasks import headline
from mmdiff_cache.training.build import Part, Setup, build_model, set_up
from mmdiff_cache.training.checkpoint import LAST, read_header
from mmdiff_cache.training.resolve import resolve


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """A training that can be had: every None is filled, its samples are there. `str()` is what is printed."""

    setup: Setup
    parameters: Mapping[str, int]
    """Trainable parameters by part of the model."""

    def __str__(self) -> str:
        return "\n".join(f"{name:<10} {text}" for name, text in _lines(self).items())


def plan(config: TrainConfig) -> TrainingPlan:
    """Resolve a configuration and count what would be trained. Raises as `train` does."""
    setup = set_up(resolve(config))
    with torch.device("meta"):
        model = build_model(setup.spec)
    return TrainingPlan(setup=setup, parameters=dict(model.parameter_counts()))


def _lines(planned: TrainingPlan) -> dict[str, str]:
    setup, config = planned.setup, planned.setup.config
    steps, batch_size = filled(config.steps), filled(config.batch_size)
    trained = sum(len(part.samples) for part in setup.parts)
    counts = ", ".join(f"{name} {count:,}" for name, count in planned.parameters.items())
    lines: dict[str, str] = {}
    for part in setup.parts:
        held_out = 0 if part.held_out is None else len(part.held_out)
        of = "" if len(setup.parts) == 1 else f" {len(lines) // 3 + 1}"
        lines |= {
            f"task{of}": f"{part.task.name} on {part.origin.dataset}, judged by {_judge(part)}",
            f"features{of}": f"{_features(part)}, from {part.store.path}",
            f"samples{of}": f"{len(part.samples):,} trained on, {held_out:,} held out",
        }
    lines |= {
        "parameters": f"{sum(planned.parameters.values()):,}: {counts}",
        "steps": f"{steps:,} of {batch_size} ({steps * batch_size / trained:.1f} passes), {_checks(config)}",
    }
    if config.run is not None and (Path(config.run) / LAST).exists():
        lines["run"] = f"{config.run}, at step {read_header(Path(config.run) / LAST).step:,}"
    return lines


def _judge(part: Part) -> str:
    order = "higher" if part.task.higher_is_better else "lower"
    return f"{headline(part.task, part.origin.dataset)} ({order} is better)"


def _features(part: Part) -> str:
    config = part.config
    if config.source != "hidden_states":
        return f"none: the {config.source} in their place"
    layers, timesteps = len(part.samples.layers), len(part.samples.timesteps)
    words = [f"{layers} layers x {timesteps} timesteps of {part.origin.backbone}"]
    if config.concepts != NO_CONCEPTS:
        words.append(f"concepts {config.concepts}")
    return ", ".join([*words, *config.discriminative])


def _checks(config: TrainConfig) -> str:
    words = f"{min(config.checks, filled(config.steps))} checks"
    return words if config.patience is None else f"{words}, ends after {config.patience} without a better one"
