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
from mmdiff_cache.loader import BATCHES_AHEAD, CachedFeatureDataset
from mmdiff_cache.training.build import Setup, build_model

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
    """What a training takes, in float32."""
    with torch.device("meta"):
        model = build_model(setup.spec).train()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        inputs = _inputs(setup)
    return Need(held=COPIES * NUMBER_BYTES * parameters, passing=_kept_for_backward(model, inputs))


def _inputs(setup: Setup) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """A batch as the model takes it, without values."""
    samples, batch_size = setup.samples, filled(setup.config.batch_size)
    reader, schema = samples.reader, samples.store.manifest.schema
    rows, columns = reader.grid
    layers = len(samples.layers)
    shape = {
        "hidden_states": (len(samples.timesteps), layers, rows, columns, reader.channels),
        "latents": (1, layers, rows, columns, schema.latent_channels),
        "images": (1, layers, *schema.image_size, 3),
    }[samples.source]
    dtype = torch.float16 if samples.source == "hidden_states" else torch.float32
    words = 0 if samples.concepts is None else len(reader.vocabularies[samples.concepts])
    encoders = (reader.discriminative[name] for name in samples.discriminative)
    return (
        torch.empty((batch_size, *shape), dtype=dtype),
        torch.empty((batch_size, words, rows, columns)) if words else None,
        tuple(torch.empty((batch_size, len(e.layers) * e.channels, *e.grid)) for e in encoders),
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


def batch_bytes(shared: Sequence[CachedFeatureDataset], batch_size: int) -> int:
    """Bytes of the hidden states of one batch that is read for all of these; other sources are small."""
    first = shared[0]
    if first.source != "hidden_states":
        return 0
    rows, columns = first.reader.grid
    layers = {layer for samples in shared for layer in samples.layers}
    timesteps = {t for samples in shared for t in samples.timesteps}
    return FEATURE_BYTES * batch_size * len(timesteps) * len(layers) * rows * columns * first.reader.channels


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
