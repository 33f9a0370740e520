"""How much memory trainings take side by side, and which of them go together.

A training holds its weights, their gradients, AdamW's two averages and the averaged weights: five numbers a
parameter. What its layers keep for the backward pass is gone before the next training takes its step, so it
counts once, for the largest; it is measured by a forward pass on torch's meta device, which computes nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdiff_cache.config import filled
from mmdiff_cache.extraction.memory import free_memory
from mmdiff_cache.loader import CachedFeatureDataset
from mmdiff_cache.loader.prefetch import BATCHES_AHEAD
from mmdiff_cache.sweeps.shared import union
from mmdiff_cache.training.build import Part, Setup, build_model, for_task

SHARE = 0.6
"""Of the free memory that the trainings of a reading may fill."""
COPIES = 5
"""Numbers a parameter: weight, gradient, AdamW's two averages, averaged weight."""
NUMBER_BYTES = 4
FEATURE_BYTES = 2
BATCHES_HELD = BATCHES_AHEAD + 2
"""Batches in memory at once: waiting, being read, being learnt from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Bytes that a training takes."""

    held: int
    """All the time."""
    passing: int
    """During its step, when the others wait."""


def need_of(setup: Setup) -> Need:
    """What a training takes, in float32; of its parts each has a step of its own."""
    with torch.device("meta"):
        network = build_model(setup.spec).train()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        passing = max(
            _kept_for_backward(for_task(network, part.task.name), _inputs(part)) for part in setup.parts
        )
    return Need(held=COPIES * NUMBER_BYTES * parameters, passing=passing)


def _inputs(part: Part) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """What the model takes at once, a batch or a part of it (`accumulate`), without values."""
    samples, reader = part.samples, part.samples.reader
    inputs, schema = samples.inputs, samples.store.manifest.schema
    at_once = -(-filled(part.config.batch_size) // part.config.accumulate)
    rows, columns = reader.grid
    encoders = [reader.discriminative[name] for name in inputs.discriminative]
    maps, layers = len(inputs.maps), len(inputs.layers)
    shape = {
        "hidden_states": lambda: (rows, columns, reader.channels),
        "latents": lambda: (rows, columns, schema.latent_channels),
        "images": lambda: (*schema.image_size, 3),
        "discriminative": lambda: (*encoders[0].grid, encoders[0].channels),
    }[inputs.source]()
    halves = inputs.source in ("hidden_states", "discriminative")
    words = len(samples.concept_names)
    beside = [reader.discriminative[name] for name in inputs.beside]
    return (
        torch.empty((at_once, maps, layers, *shape), dtype=torch.float16 if halves else torch.float32),
        torch.empty((at_once, words, rows, columns)) if words else None,
        tuple(torch.empty((at_once, len(e.layers) * e.channels, *e.grid)) for e in beside),
    )


def _kept_for_backward(model: nn.Module, inputs: tuple[object, ...]) -> int:
    """Bytes of all tensors that a forward pass keeps, each memory once; parameters do not count."""
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}  # pyright: ignore[reportPrivateUsage]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage] # meta has no addresses
        if storage not in own:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(*inputs)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def batch_bytes(setups: Sequence[Setup]) -> int:
    """Bytes of the hidden states of a batch of every part, read for all; other sources are small."""
    return filled(setups[0].config.batch_size) * sum(size for _, size in _streams(setups))


def reading_bytes(setups: Sequence[Setup]) -> int:
    """Bytes of a reading where it is decoded: batches at once, and the samples that are kept for the next
    epoch.
    """
    everything = sum(count * size for count, size in _streams(setups))
    kept = min(max(setup.config.memory for setup in setups), everything)
    return BATCHES_HELD * batch_bytes(setups) + max(kept, 0)


def _streams(setups: Sequence[Setup]) -> list[tuple[int, int]]:
    """For each part what is read for all: samples, and bytes of the hidden states of one."""
    first = setups[0]
    if first.config.source != "hidden_states":
        return []
    several = [[setup.parts[number].samples for setup in setups] for number in range(len(first.parts))]
    return [(len(samples[0]), _sample_bytes(samples)) for samples in several]


def _sample_bytes(several: Sequence[CachedFeatureDataset]) -> int:
    whole, reader = union(several), several[0].reader
    rows, columns = reader.grid
    return FEATURE_BYTES * len(whole.maps) * len(whole.layers) * rows * columns * reader.channels


def budget_of(device: str, memory: int | None) -> int | None:
    """Bytes that the trainings of one reading may take: those given, or SHARE of what is free."""
    free = free_memory(device) if memory is None else None
    return memory if free is None else int(SHARE * free)


def cut(needs: Sequence[Need], reading: int, budget: int | None) -> list[list[int]]:
    """Positions of the trainings that go together, in order; one that is too large goes alone.

    `reading` is what the batches take, `budget` None for no limit.
    """
    parts: list[list[int]] = []
    for number in range(len(needs)):
        if parts and (budget is None or reading + total(needs[n] for n in (*parts[-1], number)) <= budget):
            parts[-1].append(number)
        else:
            parts.append([number])
    return parts


def total(needs: Iterable[Need]) -> int:
    """Bytes of several trainings side by side."""
    listed = list(needs)
    return sum(need.held for need in listed) + max((need.passing for need in listed), default=0)
