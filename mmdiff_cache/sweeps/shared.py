"""Samples read once for several trainings: the union of what they take, and each one's share of it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.loader import Batch, CachedFeatureDataset, Inputs, View, taken, view_of
from mmdiff_cache.loader.inputs import WITHOUT_TRANSFORMER
from mmdiff_cache.training.build import Setup, set_up
from mmdiff_cache.training.loop import Reading, Stream
from mmdiff_cache.training.resolve import TRAIN_SPLIT
from mmdiff_cache.training.trainer import Share

T = TypeVar("T")


def lean(config: TrainConfig) -> Setup:
    """As alone, but only the shared reading keeps samples: not what a run reads to standardise by."""
    return replace(set_up(replace(config, memory=0)), config=config)


def union(several: Sequence[CachedFeatureDataset]) -> Inputs:
    """All that data sets of one split read, each thing once, in stored order."""
    first, inputs = several[0], [samples.inputs for samples in several]
    return replace(
        first.inputs,
        layers=_in_order(_stored_layers(first), (one.layers for one in inputs)),
        timesteps=_in_order(first.reader.timesteps, (one.timesteps for one in inputs)),
        guides=tuple(dict.fromkeys(guide for one in inputs for guide in one.guides)),
        discriminative=_in_order(tuple(first.reader.discriminative), (one.discriminative for one in inputs)),
    )


def read_together(several: Sequence[CachedFeatureDataset], split: str, memory: int) -> CachedFeatureDataset:
    """A data set of what several take of the same samples, in the same variants.

    Up to `memory` bytes of decoded samples are kept.
    """
    first, whole = several[0], union(several)
    assert all(samples.indices == first.indices for samples in several)
    assert all(samples.augment_seed == first.augment_seed for samples in several)
    return CachedFeatureDataset(
        first.store,
        split,
        layers=whole.layers,
        timesteps=whole.timesteps,
        concepts=whole.guides,
        labels=_in_order(tuple(first.reader.label_specs), (samples.labels for samples in several)),
        source=whole.source,
        discriminative=whole.discriminative,
        indices=first.indices,
        memory=memory,
        variants=whole.variants,
        variant_use=whole.variant_use,
        augment_seed=first.augment_seed,
    )


def share_of(own: CachedFeatureDataset, whole: CachedFeatureDataset) -> Share:
    """What a data set would have read, out of batches that were read for several."""
    view = _view(own.inputs, whole.inputs)

    def share(batch: Batch) -> Batch:
        return _laid_out(taken(batch, view), own.inputs)

    return share


def shared_reading(setups: Sequence[Setup]) -> Reading:
    """One reading of all that trainings take, a stream a part.

    It may keep as many bytes of samples as the most generous of them.
    """
    first = setups[0]
    memory = max(setup.config.memory for setup in setups) / len(first.parts)
    held_out_memory = int(memory * first.config.holdout)
    streams: list[Stream] = []
    for number in range(len(first.parts)):
        parts = [setup.parts[number] for setup in setups]
        held_out = [part.held_out for part in parts if part.held_out is not None]
        streams.append(
            Stream(
                samples=read_together(
                    [part.samples for part in parts], TRAIN_SPLIT, int(memory) - held_out_memory
                ),
                held_out=read_together(held_out, TRAIN_SPLIT, held_out_memory) if held_out else None,
            )
        )
    return replace(Reading.of(first), streams=tuple(streams))


def _view(own: Inputs, whole: Inputs) -> View:
    view = view_of(own, whole)
    if own.source in WITHOUT_TRANSFORMER:  # one map, shown once for every layer
        view = replace(view, layers=tuple(range(len(own.layers))))
    return view


def _laid_out(batch: Batch, inputs: Inputs) -> Batch:
    """The same values as a data set of one's own lays them out: sums depend on how kernels meet them."""
    if inputs.source in WITHOUT_TRANSFORMER:
        return batch
    return replace(
        batch,
        hidden_states=batch.hidden_states.contiguous(),
        concepts=_contiguous(batch.concepts),
    )


def _contiguous(maps: Tensor | None) -> Tensor | None:
    return None if maps is None else maps.contiguous()


def _stored_layers(samples: CachedFeatureDataset) -> tuple[str, ...]:
    """All that there are on the L axis, of the backbone or of the encoder that is the source."""
    if samples.inputs.source == "discriminative":
        return samples.reader.discriminative[samples.inputs.discriminative[0]].layers
    return samples.reader.layers


def _in_order(stored: tuple[T, ...], chosen: Iterable[Sequence[T]]) -> tuple[T, ...]:
    """All that is chosen, once, in stored order."""
    together = {value for values in chosen for value in values}
    return tuple(value for value in stored if value in together)
