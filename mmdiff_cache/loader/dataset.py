"""The data set: samples of one split of a store, as tensors, read in one variant or several at once."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mmdiff_cache.config import ConceptMapsConfig, Source, VariantUse, filled
from mmdiff_cache.errors import ConfigError, StoreIncomplete
from mmdiff_cache.slots import BatchSlots
from mmdiff_cache.store.reader import SplitReader, Store, open_store

from .batch import Batch
from .inputs import CROSS_ATTENTION, Guide, check_stored, plain_variant, settle
from .memory import Arrays, Row, SampleMemory
from .order import drawn_variant, partners

_logger = logging.getLogger(__name__)

_LABEL, _ENCODER = "label ", "encoder "  # prefixes of keys, so that a label set may be called 'concepts'


class CachedFeatureDataset(Dataset[dict[str, Tensor]]):
    """The samples of one split of a store, with layers and timesteps in the order in which they are given.

    `concepts` names a stored vocabulary or `cross_attention`, `concept_maps` says how its maps are read, by
    default averaged over the chosen timesteps; several `Guide`s give maps side by side. `labels` names label
    sets, `discriminative` the stored encoders. `source="latents"` yields the clean VAE latent, `"images"`
    the picture, in place of the transformer's features: once for every chosen layer, so that the same head
    can be trained on them; `"discriminative"` the blocks of the one encoder named.

    A sample is read in the first variant that is not mirrored. With `augment_seed` it is read in one of
    `variants` (by default all), drawn anew in every epoch; what is stored once, such as labels, is mirrored
    with it. With `variant_use="stack"` the variants stand one behind the other on the T axis.

    `indices` picks samples of the split, by default all. Up to `memory` bytes of decoded samples are kept, so
    that a small split is read only once.

    Raises ConfigError for anything that the store does not hold, StoreIncomplete for a sample that was never
    finished. A sample that extraction marked as failed is left out, with a warning.
    """

    def __init__(
        self,
        store: Store | str | Path,
        split: str = "train",
        layers: Sequence[str] | None = None,
        timesteps: Sequence[float] | None = None,
        concepts: str | Sequence[Guide] | None = None,
        labels: Sequence[str] = (),
        source: Source = "hidden_states",
        discriminative: Sequence[str] = (),
        indices: Sequence[int] | None = None,
        memory: int = 0,
        *,
        concept_maps: ConceptMapsConfig | None = None,
        variants: Sequence[int] | None = None,
        variant_use: VariantUse = "augment",
        augment_seed: int | None = None,
    ) -> None:
        self.store = store if isinstance(store, Store) else open_store(store)
        self.reader: SplitReader = self.store[split]
        self.inputs = settle(
            self.reader,
            self.store.manifest.schema,
            source=source,
            layers=layers,
            timesteps=timesteps,
            variants=variants,
            variant_use=variant_use,
            concepts=concepts,
            concept_maps=concept_maps,
            discriminative=discriminative,
        )
        self.labels = tuple(labels)
        check_stored("label set", self.labels, self.reader.label_specs, self.reader.path)
        self.augment_seed = augment_seed
        self._plain = plain_variant(self.reader)
        shuffled = any(guide.how.shuffled for guide in self.inputs.guides)
        self._partners = _partners(self.reader) if shuffled else {}
        everyone = range(len(self.reader)) if indices is None else indices
        self.indices = usable_samples(self.reader, everyone, self.labels)
        self.memory = SampleMemory(memory)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def layers(self) -> tuple[str, ...]:
        """Addresses of the blocks on the L axis."""
        return self.inputs.layers

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The chosen t; those of the T axis where the source has timesteps."""
        return self.inputs.timesteps

    @property
    def concept_names(self) -> tuple[str, ...]:
        """What the maps beside the features are of: concepts, or blocks whose attention they show."""
        return tuple(name for guide in self.inputs.guides for name in guide.channels)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """One sample: `hidden_states` [T L h w C], `concepts` [K h w], `discriminative/<encoder>` [D h w],
        labels [H W] by name, `index`; as in epoch 0.
        """
        batch = self.batch([position])
        item = {"hidden_states": batch.hidden_states[0], "index": batch.indices[0]}
        if batch.concepts is not None:
            item["concepts"] = batch.concepts[0]
        for name, maps in zip(self.inputs.beside, batch.discriminative, strict=True):
            item[f"discriminative/{name}"] = maps[0]
        return {**item, **{name: target[0] for name, target in batch.targets.items()}}

    def batch(
        self, positions: Sequence[int] | NDArray[np.int64], slots: BatchSlots | None = None, epoch: int = 0
    ) -> Batch:
        """The samples at these positions of the data set (0 .. len - 1), read together.

        `slots`, from `slots`, is where the memory of the hidden states is taken from; `epoch` decides the
        variants of an augmented data set.
        """
        samples = [self.indices[int(position)] for position in positions]
        return self._batch([(sample, self.variant_of(sample, epoch)) for sample in samples], slots)

    def _batch(self, rows: Sequence[Row], slots: BatchSlots | None) -> Batch:
        samples = [sample for sample, _ in rows]
        slot = None if slots is None else slots.take(len(rows))
        arrays = self._arrays(rows, None if slot is None else slot.numpy())
        stacked = {name: torch.from_numpy(array) for name, array in arrays.items()}
        features = stacked["features"] if slot is None else slot  # itself: torch knows that it is pinned
        if self.inputs.source in ("latents", "images"):
            features = features[:, None, None].expand(-1, 1, len(self.layers), -1, -1, -1)
        return Batch(
            hidden_states=features,
            concepts=stacked.get("concepts"),
            discriminative=tuple(side_by_side(stacked[_ENCODER + name]) for name in self.inputs.beside),
            targets={name: _target(stacked[_LABEL + name]) for name in self.labels},
            indices=torch.tensor(samples, dtype=torch.int64),
            ids=tuple(self.reader.ids[sample] for sample in samples),
        )

    def plain(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions as evaluation reads them, whatever training does."""
        return self._batch([(self.indices[position], self._plain) for position in positions], None)

    def variant_of(self, sample: int, epoch: int) -> int:
        """The stored variant in which a sample (a position in the split) is read in an epoch."""
        if self.augment_seed is None or self.inputs.stacked:
            return self._plain
        chosen = self.inputs.variants
        return chosen[drawn_variant(sample, len(chosen), seed=self.augment_seed, epoch=epoch)]

    def slots(self, batch_size: int, kept: int) -> BatchSlots | None:
        """Memory for batches of this data set; None where the features are not hidden states, but small."""
        if self.inputs.source != "hidden_states":
            return None
        shape = (len(self.inputs.maps), len(self.layers), *self.reader.grid, self.reader.channels)
        return BatchSlots(shape, batch_size, kept)

    def _arrays(self, rows: Sequence[Row], out: NDArray[np.float16] | None) -> Arrays:
        """The arrays of a batch: what is held comes from memory, the rest in one read from the store.

        The hidden states are put into `out`, where it is given.
        """
        held = {row: self.memory.get(row) for row in rows}
        missing = [row for row, arrays in held.items() if arrays is None]
        whole = missing == list(rows)
        read = self._read(missing, out if whole else None) if missing else {}
        fresh = {row: {k: v[n] for k, v in read.items()} for n, row in enumerate(missing)}
        for row, arrays in fresh.items():
            self.memory.put(row, arrays)
        if whole:
            return read  # already a batch: no second copy
        found = [held[row] or fresh[row] for row in rows]
        return {
            name: np.stack([arrays[name] for arrays in found], out=out if name == "features" else None)
            for name in found[0]
        }

    def _read(self, rows: Sequence[Row], out: NDArray[np.float16] | None) -> Arrays:
        samples, variants = [sample for sample, _ in rows], [variant for _, variant in rows]
        arrays: Arrays = {"features": _FEATURES[self.inputs.source](self, rows, out)}
        if self.inputs.guides:
            maps = [self._guide_maps(guide, rows) for guide in self.inputs.guides]
            arrays["concepts"] = maps[0] if len(maps) == 1 else np.concatenate(maps, axis=1)
        for name in self.inputs.beside:
            arrays[_ENCODER + name] = self.reader.discriminative_features(name, samples, variants)
        for name in self.labels:
            arrays[_LABEL + name] = self._as_read(self.reader.labels(name, samples), variants)
        return arrays

    def _guide_maps(self, guide: Guide, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Maps [B K h w] of each sample, or of its partner."""
        if guide.how.shuffled:
            rows = [(self._partners[sample], variant) for sample, variant in rows]
        samples, variants = self.draws(rows)
        timesteps = filled(guide.how.timesteps)
        if guide.name == CROSS_ATTENTION:
            stored = self.reader.cross_attention(samples, timesteps, variants)
        else:
            stored = self.reader.concept_scores(guide.name, samples, timesteps, variants)
        return guide.maps(stored.reshape(len(rows), -1, *stored.shape[2:]))

    def draws(self, rows: Sequence[Row]) -> tuple[list[int], list[int]]:
        """Sample and variant of all that is read for these rows: every stacked one, or that of the row."""
        each = [(s, self.inputs.variants if self.inputs.stacked else (v,)) for s, v in rows]
        pairs = [(sample, variant) for sample, variants in each for variant in variants]
        return [sample for sample, _ in pairs], [variant for _, variant in pairs]

    def _as_read(self, labels: NDArray[Any], variants: Sequence[int]) -> NDArray[Any]:
        """Labels [B H W], those of mirrored rows mirrored too: a store keeps one of each."""
        mirrored = [row for row, variant in enumerate(variants) if self.reader.variants[variant].flipped]
        if mirrored:
            labels[mirrored] = labels[mirrored, :, ::-1]
        return labels


def _hidden_states(
    dataset: CachedFeatureDataset, rows: Sequence[Row], out: NDArray[np.float16] | None
) -> NDArray[Any]:
    """[B T L h w C], the draws of a stack one behind the other on the T axis."""
    samples, variants = dataset.draws(rows)
    if out is not None:
        out = out.reshape(len(samples), len(dataset.timesteps), *out.shape[2:])
    found = dataset.reader.hidden_states(samples, dataset.timesteps, dataset.layers, variants, out=out)
    return found.reshape(len(rows), -1, *found.shape[2:])


def _latents(dataset: CachedFeatureDataset, rows: Sequence[Row], _: object) -> NDArray[Any]:
    return dataset.reader.latents([sample for sample, _ in rows])


def _images(dataset: CachedFeatureDataset, rows: Sequence[Row], _: object) -> NDArray[Any]:
    return picture_values(dataset.reader.images([sample for sample, _ in rows]))


def _encoder(dataset: CachedFeatureDataset, rows: Sequence[Row], _: object) -> NDArray[Any]:
    """The chosen blocks of the only encoder, [B 1 L h w D]."""
    (name,) = dataset.inputs.discriminative
    places = [dataset.reader.discriminative[name].layers.index(layer) for layer in dataset.layers]
    found = dataset.reader.discriminative_features(name, *dataset.draws(rows))
    return found[:, None, places]


def picture_values(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures of bytes as numbers in [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


_FEATURES: Mapping[
    Source,
    Callable[[CachedFeatureDataset, Sequence[Row], NDArray[np.float16] | None], NDArray[Any]],
] = {
    "hidden_states": _hidden_states,
    "latents": _latents,
    "images": _images,
    "discriminative": _encoder,
}


def side_by_side(maps: Float[Tensor, "B L h w D"]) -> Float[Tensor, "B LD h w"]:
    """All blocks of a discriminative encoder as the channels of one map."""
    return rearrange(maps, "B L h w D -> B (L D) h w")


def _target(label: Tensor) -> Tensor:
    """Ids as int64, which losses index with; metres stay float32."""
    return label if label.is_floating_point() else label.long()


def _partners(reader: SplitReader) -> dict[int, int]:
    """For each sample of a split that can be read another one. Raises ConfigError where there is only one."""
    finished = reader.finished
    if len(finished) < 2:
        raise ConfigError(
            f"concept_maps.shuffled gives a sample the maps of another one, {reader.path} has {len(finished)}"
        )
    return {sample: finished[other] for sample, other in zip(finished, partners(len(finished)), strict=True)}


def usable_samples(
    reader: SplitReader, samples: Sequence[int], labels: Sequence[str] = ()
) -> tuple[int, ...]:
    """Those of the samples that can be read, with these labels; failed ones are left out, with a warning.

    Raises StoreIncomplete if one was never finished or its record is damaged, or if none is left.
    """
    states = {n: {reader.state(n, label_set) for label_set in (None, *labels)} for n in samples}
    missing = [n for n in samples if states[n] & {"pending", "damaged"}]
    if missing:
        raise StoreIncomplete(
            f"{len(missing)} of {len(samples)} samples of {reader.path} were never finished, first "
            f"{reader.ids[missing[0]]!r}; run the extraction (or 'labels add') again, it goes on"
        )
    failed = [n for n in samples if "failed" in states[n]]
    if failed:
        names = ", ".join(reader.ids[n] for n in failed[:3]) + (", ..." if len(failed) > 3 else "")
        _logger.warning("%s: %d failed sample(s) left out: %s", reader.path, len(failed), names)
    usable = tuple(int(n) for n in samples if states[n] == {"done"})
    if not usable:
        raise StoreIncomplete(f"{reader.path} has no sample to read among the {len(samples)} asked for")
    return usable
