"""From a resolved configuration to what is trained: samples, held-out samples, and the spec of the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.errors import CheckpointError, ConfigError
from mmdiff_cache.loader import CachedFeatureDataset, sample_order
from mmdiff_cache.models.mmdiff import MMDiff, ModelSpec, resolve_model
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.store.manifest import hash_of_ids
from mmdiff_cache.store.reader import Store, open_store
from mmdiff_cache.tasks import Task, find_task, out_channels
from mmdiff_cache.training.pixels import PIXELS_MULTIPLE, PixelSpec, PixelUNet
from mmdiff_cache.training.resolve import (
    TRAIN_SPLIT,
    Origin,
    encoder_hashes,
    label_spec,
    origin,
    training_samples,
)

Model = MMDiff | PixelUNet
Spec = ModelSpec | PixelSpec

HOLDOUT_STREAM = 2**63
"""Number of the random stream that draws the held-out samples; epochs count from 0 and never reach it."""
DEPTH_SAMPLES = 256
"""Training labels, evenly spaced, that the typical depth is taken from."""

_KINDS: Mapping[str, tuple[type[Any], Callable[[Any], Model]]] = {
    "mmdiff": (ModelSpec, MMDiff.from_spec),
    "pixels": (PixelSpec, PixelUNet),
}


def build_model(spec: Spec) -> Model:
    """A model with fresh weights, drawn from torch's global generator."""
    return _KINDS[_kind(spec)][1](spec)


def spec_to_json(spec: Spec) -> dict[str, Any]:
    """The spec as JSON, with the kind of model it describes."""
    return {"kind": _kind(spec), **spec.to_json()}


def spec_from_json(values: Mapping[str, Any]) -> Spec:
    """Read back what `spec_to_json` gave. Raises CheckpointError for a kind or field it does not know."""
    fields = dict(values)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise CheckpointError(f"the checkpoint holds a model of kind {kind!r}; known are {', '.join(_KINDS)}")
    try:
        return _KINDS[kind][0].from_json(fields)
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint's model cannot be built by this code: {error}") from error


def _kind(spec: Spec) -> str:
    return next(name for name, (cls, _) in _KINDS.items() if isinstance(spec, cls))


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Everything a training needs besides weights."""

    config: TrainConfig
    task: Task
    store: Store
    origin: Origin
    label: LabelSpec
    samples: CachedFeatureDataset
    """What is trained on."""
    held_out: CachedFeatureDataset | None
    """What picks the best checkpoint; None where nothing is held out."""
    spec: Spec

    @property
    def store_identity(self) -> dict[str, str]:
        """What a checkpoint must have in common with the store to go on: its origin and its samples."""
        ids = [self.samples.reader.ids[index] for index in self.samples.indices]
        return {
            "fingerprint": self.origin.fingerprint,
            "dataset": self.origin.dataset,
            "backbone": self.origin.backbone,
            "prompts": self.origin.prompts,
            "sha256_of_ids": hash_of_ids(ids),
            **encoder_hashes(self.store, self.config.discriminative),
        }


def set_up(config: TrainConfig) -> Setup:
    """Open the store of a resolved configuration and split its training samples."""
    task, store = find_task(config.task, config.label), open_store(config.stores[0])
    reader = store[TRAIN_SPLIT]
    label = label_spec(reader, task)
    kept, held = split_samples(
        training_samples(reader, config.limit, task.label), config.holdout, config.reading_seed
    )
    samples = open_dataset(config, store, TRAIN_SPLIT, kept, share=1 - config.holdout)
    return Setup(
        config=config,
        task=task,
        store=store,
        origin=origin(store),
        label=label,
        samples=samples,
        held_out=open_dataset(config, store, TRAIN_SPLIT, held, share=config.holdout) if held else None,
        spec=make_spec(config, samples, label),
    )


def open_dataset(
    config: TrainConfig, store: Store, split: str, indices: tuple[int, ...] | None = None, share: float = 0.0
) -> CachedFeatureDataset:
    """The samples of a split as a resolved configuration reads them; `share` of its memory may keep them."""
    return CachedFeatureDataset(
        store,
        split,
        layers=config.layers,
        timesteps=config.timesteps,
        concepts=config.concepts,
        labels=(find_task(config.task, config.label).label,),
        source=config.source,
        discriminative=config.discriminative,
        indices=indices,
        memory=int(config.memory * share),
    )


def split_samples(
    samples: tuple[int, ...], holdout: float, seed: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cut the samples into those trained on and those held out, by a seeded draw; both keep their order.

    At least one sample is held out where a share is asked for. Raises ConfigError if none would be left.
    """
    count = max(1, round(holdout * len(samples))) if holdout else 0
    if count >= len(samples):
        raise ConfigError(
            f"holding out {holdout:g} of {len(samples)} sample(s) leaves none to train on; "
            "take more samples or --set holdout=0"
        )
    held = set(sample_order(len(samples), seed=seed, epoch=HOLDOUT_STREAM)[:count].tolist())
    kept = tuple(sample for position, sample in enumerate(samples) if position not in held)
    return kept, tuple(sample for position, sample in enumerate(samples) if position in held)


def make_spec(config: TrainConfig, samples: CachedFeatureDataset, label: LabelSpec) -> Spec:
    """The shape of the model that fits these samples."""
    task, schema = find_task(config.task, config.label), samples.store.manifest.schema
    depth = typical_depth(samples, label) if task.output == "depth" else 1.0
    if config.source == "images":
        if any(side % PIXELS_MULTIPLE for side in schema.image_size):
            raise ConfigError(
                f"source 'images' needs pictures whose sides are multiples of {PIXELS_MULTIPLE} pixels, "
                f"{samples.store.path} has {schema.image_size}"
            )
        return PixelSpec(out_channels=out_channels(label), output=task.output, typical_depth=depth)
    latents = config.source == "latents"
    vocabularies, encoders = samples.reader.vocabularies, samples.reader.discriminative
    return resolve_model(
        ModelSpec(
            decoder=filled(config.decoder),
            out_channels=out_channels(label),
            layers=len(samples.layers),
            channels=schema.latent_channels if latents else schema.channels,
            timesteps=1 if latents else len(samples.timesteps),
            cleanest=0 if latents else int(np.argmin(samples.timesteps)),
            grid=schema.grid,
            patch=schema.image_size[0] // schema.grid[0],
            concepts=0 if samples.concepts is None else len(vocabularies[samples.concepts]),
            discriminative=tuple(
                len(encoders[name].layers) * encoders[name].channels for name in samples.discriminative
            ),
            aggregator=config.aggregator,
            decoder_width=config.decoder_width,
            source="latents" if latents else "hidden_states",
            output=task.output,
            typical_depth=depth,
        )
    )


def typical_depth(samples: CachedFeatureDataset, label: LabelSpec) -> float:
    """Geometric mean, in metres, of the valid depths in (a part of) the training labels."""
    low, high = label.valid_range or (0.0, float("inf"))
    step = -(-len(samples.indices) // DEPTH_SAMPLES)
    total, count = 0.0, 0
    for index in samples.indices[::step]:
        depth = samples.reader.labels(label.name, [index])
        valid = depth[(depth > low) & (depth < high)].astype(np.float64)
        total, count = total + float(np.log(valid).sum()), count + valid.size
    if not count:
        raise ConfigError(
            f"label set {label.name!r} of {samples.store.path} has no depth within {low:g} to {high:g} m"
        )
    return float(np.exp(total / count))
