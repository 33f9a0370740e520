"""What a training is going to be, said before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.loader import WITHOUT_TRANSFORMER, Guide, Inputs
from mmdiff_cache.models.mmdiff import ModelSpec
from mmdiff_cache.models.unified import UnifiedSpec
from mmdiff_cache.tasks import headline
from mmdiff_cache.training.build import Part, Setup, Spec, build_model, set_up
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
    if len(setup.parts) > 1:
        lines["mixing"] = _mixing(setup)
    lines |= {
        "model": _model(setup.spec),
        "parameters": f"{sum(planned.parameters.values()):,}: {counts}",
        "steps": f"{_steps(setup)}, {_checks(config)}, {config.precision} on {config.device}",
    }
    if config.run is not None and (Path(config.run) / LAST).exists():
        lines["run"] = f"{config.run}, at step {read_header(Path(config.run) / LAST).step:,}"
    return lines


def _judge(part: Part) -> str:
    order = "higher" if part.task.higher_is_better else "lower"
    return f"{headline(part.task, part.origin.dataset)} ({order} is better)"


def _features(part: Part) -> str:
    """What is read of a sample: features, how they are treated, what joins them."""
    config, inputs = part.config, part.samples.inputs
    words = [_source(inputs, part.origin.backbone)]
    if not inputs.stacked and len(inputs.variants) > 1:
        words.append(f"one of {len(inputs.variants)} variants an epoch")
    if config.drop_channels:
        words.append(f"{_counted(len(config.drop_channels), 'channel')} dropped")
    if config.standardise:
        words.append("standardised")
    return ", ".join([*words, *(_maps(guide, inputs) for guide in inputs.guides), *inputs.beside])


def _source(inputs: Inputs, backbone: str) -> str:
    if inputs.source in WITHOUT_TRANSFORMER:
        return f"none: the {inputs.source} in their place"
    layers = _counted(len(inputs.layers), "layer")
    if inputs.source == "discriminative":
        return f"{layers} of {inputs.discriminative[0]} alone"
    draws = f" x {_counted(len(inputs.variants), 'draw')}" if inputs.stacked else ""
    return f"{layers} x {_counted(len(inputs.timesteps), 'timestep')}{draws} of {backbone}"


def _maps(guide: Guide, inputs: Inputs) -> str:
    """Concept maps; what is unusual about them is said."""
    words = f"concepts {guide.name}"
    timesteps = filled(guide.how.timesteps)
    if set(timesteps) != set(inputs.timesteps):
        words += f" at t = {', '.join(f'{t:g}' for t in timesteps)}"
    return f"{words} of other samples" if guide.how.shuffled else words


def _mixing(setup: Setup) -> str:
    """How often the batches of several tasks come, and what their losses count."""
    config, names = setup.config, [part.task.name for part in setup.parts]
    ratio = " : ".join(f"{share:g}" for share in setup.ratio)
    counts = f"1 / the mean of their first {config.balance_steps:,}"
    if config.loss_weights is not None:
        counts = ", ".join(f"{weight:g}" for weight in config.loss_weights)
    return f"batches of {', '.join(names)} as {ratio}, losses count {counts}"


def _model(spec: Spec) -> str:
    trunk = spec.trunk if isinstance(spec, UnifiedSpec) else spec
    if not isinstance(trunk, ModelSpec):
        return "a small U-Net on the pictures"
    aggregator = trunk.aggregator
    kind = f"{aggregator.kind} ({aggregator.preset})" if aggregator.kind == "token" else aggregator.kind
    width = "" if trunk.decoder == "linear" else f" {trunk.decoder_width} wide"
    return f"aggregator {kind} {aggregator.width} wide, decoder {trunk.decoder}{width}"


def _steps(setup: Setup) -> str:
    """How many, of how many samples; a part that has fewer than a batch gives all of them each time."""
    steps, batch_size = filled(setup.config.steps), filled(setup.config.batch_size)
    have = [len(part.samples) for part in setup.parts]
    taken = sum(share * min(batch_size, count) for share, count in zip(setup.ratio, have, strict=True))
    passes = steps * taken / sum(setup.ratio) / sum(have)
    whole = "" if min(have) >= batch_size else ", or all that there are"
    return f"{steps:,} of {batch_size}{whole} ({passes:.1f} passes)"


def _checks(config: TrainConfig) -> str:
    words = _counted(min(config.checks, filled(config.steps)), "check")
    return words if config.patience is None else f"{words}, ends after {config.patience} without a better one"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
