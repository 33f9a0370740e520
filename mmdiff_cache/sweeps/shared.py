"""Samples read once for several trainings: the union of what they take, and each one's view of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mmdiff_cache.loader import Batch, CachedFeatureDataset, SampleMemory
from mmdiff_cache.slots import BatchSlots
from mmdiff_cache.store.concepts import concept_maps, map_blocks

T = TypeVar("T")

MAPS_SHARE = 0.1
"""Of the memory for decoded samples, what concept maps may take: they are small beside the features."""

MapsName = tuple[str, tuple[float, ...]]
"""A vocabulary, and the timesteps over which its maps are averaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedBatch(Batch):
    """A batch with the concept maps of every training that shares it."""

    maps: Mapping[MapsName, Float[Tensor, "B K h w"]]


class SharedSamples(CachedFeatureDataset):
    """The samples of several data sets of one split, with all their layers, timesteps, labels and encoders.

    All must have the same samples. `memory` is as in CachedFeatureDataset.
    """

    def __init__(self, parts: Sequence[CachedFeatureDataset], split: str, memory: int) -> None:
        first = parts[0]
        assert all(part.indices == first.indices and part.source == first.source for part in parts)
        for_maps = int(memory * MAPS_SHARE)
        super().__init__(
            first.store,
            split,
            layers=_in_order(first.reader.layers, (part.layers for part in parts)),
            timesteps=_in_order(first.reader.timesteps, (part.timesteps for part in parts)),
            labels=_in_order(tuple(first.reader.label_specs), (part.labels for part in parts)),
            source=first.source,
            discriminative=_in_order(
                tuple(first.reader.discriminative), (part.discriminative for part in parts)
            ),
            indices=first.indices,
            memory=memory - for_maps,
        )
        self.maps: tuple[MapsName, ...] = tuple(
            dict.fromkeys((part.concepts, part.timesteps) for part in parts if part.concepts is not None)
        )
        self._map_memory = SampleMemory(for_maps)

    def batch(self, positions: Sequence[int] | NDArray[np.int64], slots: BatchSlots | None = None) -> Batch:
        """The samples at these positions, with all concept maps; see `view_of`."""
        batch = super().batch(positions, slots)
        values = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        return SharedBatch(**values, maps=self._concept_maps(batch.indices.tolist()))

    def _concept_maps(self, samples: Sequence[int]) -> dict[MapsName, Float[Tensor, "B K h w"]]:
        """The maps of all vocabularies; what is held comes from memory, the rest in one read."""
        if not self.maps:
            return {}
        held = {sample: self._map_memory.get(sample) for sample in samples}
        missing = [sample for sample, row in held.items() if row is None]
        read = self._read_maps(missing) if missing else {}
        for row, sample in enumerate(missing):
            held[sample] = {name: maps[row] for name, maps in read.items()}
            self._map_memory.put(sample, held[sample] or {})
        rows = [held[sample] or {} for sample in samples]
        return {
            name: torch.from_numpy(np.stack([row[str(number)] for row in rows]))
            for number, name in enumerate(self.maps)
        }

    def _read_maps(self, samples: Sequence[int]) -> dict[str, NDArray[np.generic]]:
        """Maps by the number of their name: each from the scores of its own timesteps, as alone."""
        arrays: dict[str, NDArray[np.generic]] = {}
        for vocabulary in dict.fromkeys(name for name, _ in self.maps):
            scores = self.reader.concept_scores(vocabulary, samples, self.timesteps)
            blocks = map_blocks(self.store.manifest.schema, vocabulary)
            for number, (name, timesteps) in enumerate(self.maps):
                if name == vocabulary:
                    own = scores[:, [self.timesteps.index(t) for t in timesteps]]
                    arrays[str(number)] = concept_maps(np.ascontiguousarray(own), blocks)
        return arrays


def _in_order(stored: tuple[T, ...], chosen: Iterable[Sequence[T]]) -> tuple[T, ...]:
    """All that is chosen, once, in stored order."""
    together = {value for values in chosen for value in values}
    return tuple(value for value in stored if value in together)


def view_of(own: CachedFeatureDataset, shared: SharedSamples) -> Callable[[Batch], Batch]:
    """What a data set would have read, out of a batch of the shared one: the same values, laid out alike."""
    steps = [shared.timesteps.index(t) for t in own.timesteps]
    layers = [shared.layers.index(layer) for layer in own.layers]
    encoders = [shared.discriminative.index(name) for name in own.discriminative]

    def view(batch: Batch) -> Batch:
        assert isinstance(batch, SharedBatch)
        features = batch.hidden_states
        if own.source == "hidden_states":
            features = _chosen(_chosen(features, 1, steps), 2, layers)
        else:  # one map, shown once for every layer
            features = features[:, :, : len(layers)]
        return Batch(
            hidden_states=features,
            concepts=None if own.concepts is None else batch.maps[own.concepts, own.timesteps],
            discriminative=tuple(batch.discriminative[number] for number in encoders),
            targets={name: batch.targets[name] for name in own.labels},
            indices=batch.indices,
            ids=batch.ids,
        )

    return view


def _chosen(features: Tensor, axis: int, places: Sequence[int]) -> Tensor:
    """Some places of an axis as a contiguous tensor; the tensor itself where all are chosen."""
    if list(places) == list(range(features.shape[axis])):
        return features
    return features.index_select(axis, torch.tensor(places))
