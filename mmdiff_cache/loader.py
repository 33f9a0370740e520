"""The store as torch tensors: a data set for any model of one's own, and the loader that training uses.

    data = CachedFeatureDataset("data/scenes/flux-scenes", split="train", layers=["single.4"])
    data[0]["hidden_states"]                 # float16 [T L h w C]
    for batch in make_loader(data, batch_size=8): ...

Only the (timestep, layer) chunks that are asked for are read. Batches are prefetched by threads of this
process, into memory that is used over and over: reading and decompressing release the interpreter's lock, and
no second process needs a copy of anything.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mmdiff_cache.errors import ConfigError, StoreIncomplete
from mmdiff_cache.slots import BatchSlots
from mmdiff_cache.store.concepts import concept_maps, map_blocks
from mmdiff_cache.store.reader import SplitReader, Store, open_store

_logger = logging.getLogger(__name__)

Source = Literal["hidden_states", "latents", "images"]
Arrays = dict[str, NDArray[np.generic]]

NO_CONCEPTS = "none"
PREFETCH_THREADS = 2
BATCHES_AHEAD = 2
"""Batches that wait in memory; one of eight FLUX.1-dev samples at 4 x 4 maps has 0.8 GB."""
_LABEL, _ENCODER = "label ", "encoder "  # prefixes of keys, so that a label set may be called 'concepts'


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B samples as tensors on the CPU, ready for a model and its loss."""

    hidden_states: Float[Tensor, "B T L h w C"]
    """float16 features; with source `latents` the float32 latent, with `images` the picture in [-1, 1]; then
    T = 1.
    """
    concepts: Float[Tensor, "B K h w"] | None
    """Concept maps in [0, 1] that add up to 1 over the concepts."""
    discriminative: tuple[Tensor, ...]
    """One map [B D h w] a discriminative encoder, on its own grid: all channels of its blocks, in order."""
    targets: Mapping[str, Tensor]
    """Labels at network size [B H W] by name: int64 class ids, int64 masks, float32 metres."""
    indices: Int64[Tensor, " B"]
    """Positions of the samples in the split of the store."""
    ids: tuple[str, ...]


def sample_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of 0..count-1 over the whole split, the same for the same (seed, epoch) everywhere."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return generator.permutation(count).astype(np.int64)


def batches_per_epoch(count: int, batch_size: int, *, drop_last: bool) -> int:
    """How many batches one pass over `count` samples has; at least one, so that a tiny split still trains."""
    return max(1, count // batch_size if drop_last else -(-count // batch_size))


def batch_positions(
    step: int,
    count: int,
    batch_size: int,
    *,
    seed: int,
    shuffle: bool,
    drop_last: bool,
    rank: int = 0,
    world_size: int = 1,
) -> NDArray[np.int64]:
    """The data set's positions that make up batch number `step`, counted from 0 over all epochs.

    Of several ranks each takes every `world_size`-th of the `batch_size * world_size` samples of a step, so
    that together they see what one process with a batch of that size would see.
    """
    together = batch_size * world_size
    epoch, number = divmod(step, batches_per_epoch(count, together, drop_last=drop_last))
    order = sample_order(count, seed=seed, epoch=epoch) if shuffle else np.arange(count)
    return order[number * together : (number + 1) * together][rank::world_size]


class SampleMemory:
    """Decoded samples kept up to a limit in bytes; what no longer fits is read from the store again."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held_bytes = 0
        self._samples: dict[int, Arrays] = {}
        self._lock = threading.Lock()

    def get(self, sample: int) -> Arrays | None:
        """The arrays of a sample, or None if it is not held."""
        return self._samples.get(sample)

    def put(self, sample: int, arrays: Arrays) -> None:
        """Keep a sample if it still fits."""
        size = sum(array.nbytes for array in arrays.values())
        with self._lock:
            if sample not in self._samples and self.held_bytes + size <= self.limit:
                self._samples[sample] = {name: np.array(array) for name, array in arrays.items()}
                self.held_bytes += size


class CachedFeatureDataset(Dataset[dict[str, Tensor]]):
    """The samples of one split of a store, with layers and timesteps in the order in which they are given.

    `concepts` names a stored vocabulary; its maps are averaged over the chosen timesteps. `labels` names
    label sets, `discriminative` the stored encoders. `source="latents"` yields the clean VAE latent,
    `"images"` the picture, in place of the transformer's features: once for every chosen layer, so that the
    same head can be trained on them.
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
        concepts: str | None = None,
        labels: Sequence[str] = (),
        source: Source = "hidden_states",
        discriminative: Sequence[str] = (),
        indices: Sequence[int] | None = None,
        memory: int = 0,
    ) -> None:
        self.store = store if isinstance(store, Store) else open_store(store)
        self.reader: SplitReader = self.store[split]
        self.layers = tuple(layers or self.reader.layers)
        self.timesteps = tuple(timesteps or self.reader.timesteps)
        self.source: Source = source
        self.concepts = None if concepts == NO_CONCEPTS else concepts
        self.labels = tuple(labels)
        self.discriminative = tuple(discriminative)
        self._check()
        everyone = range(len(self.reader)) if indices is None else indices
        self.indices = usable_samples(self.reader, everyone, self.labels)
        self.memory = SampleMemory(memory)

    def _check(self) -> None:
        """Raise ConfigError for the first name that the store does not hold."""
        for layer in self.layers:
            self.reader.layer_index(layer)
        for timestep in self.timesteps:
            self.reader.timestep_index(timestep)
        for what, names, stored in (
            ("concept vocabulary", [self.concepts] if self.concepts else [], self.reader.vocabularies),
            ("label set", self.labels, self.reader.label_specs),
            ("discriminative features", self.discriminative, self.reader.discriminative),
        ):
            for name in names:
                if name not in stored:
                    raise ConfigError(
                        f"{what} {name!r} is not in {self.reader.path}; stored: {', '.join(stored) or 'none'}"
                    )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """One sample: `hidden_states` [T L h w C], `concepts` [K h w], `discriminative/<encoder>` [D h w],
        labels [H W] by name, `index`.
        """
        batch = self.batch([position])
        item = {"hidden_states": batch.hidden_states[0], "index": batch.indices[0]}
        if batch.concepts is not None:
            item["concepts"] = batch.concepts[0]
        for name, maps in zip(self.discriminative, batch.discriminative, strict=True):
            item[f"discriminative/{name}"] = maps[0]
        return {**item, **{name: target[0] for name, target in batch.targets.items()}}

    def batch(self, positions: Sequence[int] | NDArray[np.int64], slots: BatchSlots | None = None) -> Batch:
        """The samples at these positions of the data set (0 .. len - 1), read together.

        `slots`, from `slots`, is where the memory of the hidden states is taken from.
        """
        samples = [self.indices[int(position)] for position in positions]
        slot = None if slots is None else slots.take(len(samples))
        arrays = self._arrays(samples, None if slot is None else slot.numpy())
        stacked = {name: torch.from_numpy(array) for name, array in arrays.items()}
        features = stacked["features"] if slot is None else slot  # itself: torch knows that it is pinned
        if self.source != "hidden_states":
            features = features[:, None, None].expand(-1, 1, len(self.layers), -1, -1, -1)
        return Batch(
            hidden_states=features,
            concepts=stacked.get("concepts"),
            discriminative=tuple(side_by_side(stacked[_ENCODER + name]) for name in self.discriminative),
            targets={name: _target(stacked[_LABEL + name]) for name in self.labels},
            indices=torch.tensor(samples, dtype=torch.int64),
            ids=tuple(self.reader.ids[sample] for sample in samples),
        )

    def slots(self, batch_size: int, kept: int) -> BatchSlots | None:
        """Memory for batches of this data set; None where the features are not hidden states, but small."""
        if self.source != "hidden_states":
            return None
        shape = (len(self.timesteps), len(self.layers), *self.reader.grid, self.reader.channels)
        return BatchSlots(shape, batch_size, kept)

    def _arrays(self, samples: Sequence[int], out: NDArray[np.float16] | None) -> Arrays:
        """The arrays of a batch: what is held comes from memory, the rest in one read from the store.

        The hidden states are put into `out`, where it is given.
        """
        held = {sample: self.memory.get(sample) for sample in samples}
        missing = [sample for sample, row in held.items() if row is None]
        whole = missing == list(samples)
        read = self._read(missing, out if whole else None) if missing else {}
        fresh = {sample: {k: v[n] for k, v in read.items()} for n, sample in enumerate(missing)}
        for sample, row in fresh.items():
            self.memory.put(sample, row)
        if whole:
            return read  # already a batch: no second copy
        rows = [held[sample] or fresh[sample] for sample in samples]
        return {
            name: np.stack([row[name] for row in rows], out=out if name == "features" else None)
            for name in rows[0]
        }

    def _read(self, samples: Sequence[int], out: NDArray[np.float16] | None) -> Arrays:
        arrays: Arrays = {"features": _FEATURES[self.source](self, samples, out)}
        if self.concepts is not None:
            scores = self.reader.concept_scores(self.concepts, samples, self.timesteps)
            arrays["concepts"] = concept_maps(scores, map_blocks(self.store.manifest.schema, self.concepts))
        for name in self.discriminative:
            arrays[_ENCODER + name] = self.reader.discriminative_features(name, samples)
        for name in self.labels:
            arrays[_LABEL + name] = self.reader.labels(name, samples)
        return arrays


def _hidden_states(
    dataset: CachedFeatureDataset, samples: Sequence[int], out: NDArray[np.float16] | None
) -> NDArray[np.generic]:
    return dataset.reader.hidden_states(samples, dataset.timesteps, dataset.layers, out=out)


def _latents(dataset: CachedFeatureDataset, samples: Sequence[int], _: object) -> NDArray[np.generic]:
    return dataset.reader.latents(samples)


def _images(dataset: CachedFeatureDataset, samples: Sequence[int], _: object) -> NDArray[np.generic]:
    return picture_values(dataset.reader.images(samples))


def picture_values(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures of bytes as numbers in [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


_FEATURES: Mapping[
    Source,
    Callable[[CachedFeatureDataset, Sequence[int], NDArray[np.float16] | None], NDArray[np.generic]],
] = {
    "hidden_states": _hidden_states,
    "latents": _latents,
    "images": _images,
}


def side_by_side(maps: Float[Tensor, "B L h w D"]) -> Float[Tensor, "B LD h w"]:
    """All blocks of a discriminative encoder as the channels of one map."""
    return rearrange(maps, "B L h w D -> B (L D) h w")


def _target(label: Tensor) -> Tensor:
    """Ids as int64, which losses index with; metres stay float32."""
    return label if label.is_floating_point() else label.long()


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
            f"{reader.ids[missing[0]]!r}; run the extraction (or 'labels add') again, it goes on, or take "
            "fewer (--limit)"
        )
    failed = [n for n in samples if "failed" in states[n]]
    if failed:
        names = ", ".join(reader.ids[n] for n in failed[:3]) + (", ..." if len(failed) > 3 else "")
        _logger.warning("%s: %d failed sample(s) left out: %s", reader.path, len(failed), names)
    usable = tuple(int(n) for n in samples if states[n] == {"done"})
    if not usable:
        raise StoreIncomplete(f"{reader.path} has no sample to read among the {len(samples)} asked for")
    return usable


def make_loader(
    dataset: CachedFeatureDataset,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    start: int = 0,
    steps: int | None = None,
    threads: int = PREFETCH_THREADS,
    ahead: int = BATCHES_AHEAD,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Batches number `start` to `start + steps`, counted over all epochs; by default to the end of an epoch.

    Each epoch is a true shuffle of the whole split, given by (seed, epoch) alone, so that a training that
    goes on at step n sees what it would have seen. At most `ahead` batches wait in memory while `threads`
    threads read on; see BatchSlots for how memory is used again.

    `batch_size` is that of one rank. The ranks divide each epoch among them, no sample lost or seen twice,
    and all count the same steps; in a short last batch, which `drop_last` leaves out, a rank may have fewer
    samples or, without any, no batch. Raises ConfigError for a rank that is none, or more ranks than
    samples.
    """
    count, together = len(dataset), batch_size * world_size
    if not 0 <= rank < world_size <= count:
        raise ConfigError(
            f"rank must be 0 to world_size - 1, and world_size at most the {count} samples, "
            f"got rank {rank} of {world_size}"
        )
    per_epoch = batches_per_epoch(count, together, drop_last=drop_last)
    stop = start + (per_epoch - start % per_epoch if steps is None else steps)
    mine = (step for step in range(start, stop) if step % per_epoch * together + rank < count)
    slots = dataset.slots(batch_size, kept=ahead + 2)

    def load(step: int) -> Batch:
        positions = batch_positions(
            step,
            count,
            batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        return dataset.batch(positions, slots)

    return _prefetched(load, mine, threads, ahead)


def _prefetched(
    load: Callable[[int], Batch], steps: Iterable[int], threads: int, ahead: int
) -> Iterator[Batch]:
    """Load batches in other threads, up to `ahead` of the one that is asked for."""
    waiting: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="mmdiff-loader") as pool:
        try:
            for step in steps:
                waiting.append(pool.submit(load, step))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
