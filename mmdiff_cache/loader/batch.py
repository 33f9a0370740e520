"""Samples side by side, and the part of them that one of several models reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float, Int64
from torch import Tensor

from .inputs import Inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B samples as tensors on the CPU, ready for a model and its loss."""

    hidden_states: Float[Tensor, "B T L h w C"]
    """float16 features; with source `latents` the float32 latent, with `images` the picture in [-1, 1],
    with `discriminative` the encoder's blocks: then T = 1.
    """
    concepts: Float[Tensor, "B K rows columns"] | None
    """Concept maps in [0, 1] that add up to 1 over the concepts, or averaged attention, of the order of 1;
    on the backbone's grid, whatever the source.
    """
    discriminative: tuple[Tensor, ...]
    """One map [B D h w] a discriminative encoder, on its own grid: all channels of its blocks, in order."""
    targets: Mapping[str, Tensor]
    """Labels at network size [B H W] by name: int64 class ids, int64 masks, float32 metres."""
    indices: Int64[Tensor, " B"]
    """Positions of the samples in the split of the store."""
    ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Positions, on the axes of a batch that was read for several models, of what one of them reads."""

    timesteps: tuple[int, ...]
    layers: tuple[int, ...]
    concepts: tuple[int, ...]
    discriminative: tuple[int, ...]


def view_of(part: Inputs, whole: Inputs) -> View:
    """Where in a batch that was read for `whole` stands what `part` asks for; it must all be there."""
    channels = [(guide, name) for guide in whole.guides for name in guide.channels]
    return View(
        timesteps=tuple(whole.maps.index(one) for one in part.maps),
        layers=tuple(whole.layers.index(layer) for layer in part.layers),
        concepts=tuple(channels.index((guide, name)) for guide in part.guides for name in guide.channels),
        discriminative=tuple(whole.beside.index(name) for name in part.beside),
    )


def taken(batch: Batch, view: View) -> Batch:
    """What one model reads of a batch; of what it reads whole the very tensors."""
    hidden_states = _along(_along(batch.hidden_states, 1, view.timesteps), 2, view.layers)
    maps = batch.concepts
    return replace(
        batch,
        hidden_states=hidden_states,
        concepts=None if maps is None or not view.concepts else _along(maps, 1, view.concepts),
        discriminative=tuple(batch.discriminative[place] for place in view.discriminative),
    )


def _along(values: Tensor, axis: int, places: Sequence[int]) -> Tensor:
    """The values at these places of an axis: a view where they are consecutive, else a copy."""
    first, count = places[0], len(places)
    if list(places) == list(range(first, first + count)):
        return values.narrow(axis, first, count)
    return values.index_select(axis, values.new_tensor(places).long())
