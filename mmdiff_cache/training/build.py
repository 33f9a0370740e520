"""From a resolved configuration to what is trained: samples, held-out samples, and the spec of the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.errors import CheckpointError, ConfigError
from mmdiff_cache.loader import CachedFeatureDataset, Inputs
from mmdiff_cache.models.mmdiff import MMDiff, ModelSpec, resolve_model
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.store.manifest import hash_of_ids
from mmdiff_cache.store.reader import Store, open_store
from mmdiff_cache.tasks import Task, find_task, out_channels
from mmdiff_cache.training.division import divide
from mmdiff_cache.training.pixels import PIXELS_MULTIPLE, PixelSpec, PixelUNet
from mmdiff_cache.training.resolve import (
    TRAIN_SPLIT,
    Origin,
    encoder_hashes,
    label_spec,
    origin,
    source_channels,
)

Model = MMDiff | PixelUNet
Spec = ModelSpec | PixelSpec

DEPTH_SAMPLES = 256
"""Training labels, evenly spaced, that the typical depth is taken from."""
STATISTICS_SAMPLES = 256
"""Training samples, evenly spaced, whose features are measured for a standardisation."""

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
    division = divide(config, reader, task.label)
    held = division.held_out
    samples = open_dataset(
        config, store, TRAIN_SPLIT, division.trained, share=1 - config.holdout, augment=True
    )
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
    config: TrainConfig,
    store: Store,
    split: str,
    indices: tuple[int, ...] | None = None,
    share: float = 0.0,
    *,
    augment: bool = False,
) -> CachedFeatureDataset:
    """The samples of a split as a resolved configuration reads them; `share` of its memory may keep them.

    `augment` reads them as training does, another stored variant in every epoch; else only what evaluation
    reads must be stored.
    """
    wanted = config.variants if augment or config.variant_use == "stack" else None
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
        concept_maps=config.concept_maps,
        variants=wanted,
        variant_use=config.variant_use,
        augment_seed=config.seed if augment else None,
    )


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
    inputs, encoders = samples.inputs, samples.reader.discriminative
    grid = encoders[inputs.discriminative[0]].grid if inputs.source == "discriminative" else schema.grid
    return resolve_model(
        ModelSpec(
            decoder=filled(config.decoder),
            out_channels=out_channels(label),
            layers=len(inputs.layers),
            channels=source_channels(samples.store, inputs),
            timesteps=len(inputs.maps),
            cleanest=_cleanest(inputs),
            grid=grid,
            patch=schema.image_size[0] // grid[0],
            concepts=len(samples.concept_names),
            discriminative=tuple(
                len(encoders[name].layers) * encoders[name].channels for name in inputs.beside
            ),
            aggregator=config.aggregator,
            decoder_width=config.decoder_width,
            source="latents" if inputs.source == "latents" else "hidden_states",
            output=task.output,
            typical_depth=depth,
            standardise=config.standardise,
            drop_channels=config.drop_channels,
        )
    )


def _cleanest(inputs: Inputs) -> int:
    """Index on the T axis of the smallest t, in the first draw; 0 where the source has no timesteps."""
    return int(np.argmin([0.0 if timestep is None else timestep for _, timestep in inputs.maps]))


def fit_standardisation(model: Model, samples: CachedFeatureDataset) -> None:
    """Measure the mean and deviation of every (timestep, layer, channel) that a model standardises by.

    Over at most `STATISTICS_SAMPLES` training samples, evenly spaced, as evaluation reads them; sums are
    float64. A model without a standardisation is left as it is.
    """
    if not isinstance(model, MMDiff) or not model.spec.standardise:
        return
    step = -(-len(samples) // STATISTICS_SAMPLES)
    positions = range(0, len(samples), step)
    total = square = torch.zeros((), dtype=torch.float64)
    for position in positions:
        features = samples.plain([position]).hidden_states[0]
        maps = [features[t].double() for t in range(len(features))]  # one timestep: a whole sample is large
        total = total + torch.stack([one.sum(dim=(1, 2)) for one in maps])
        square = square + torch.stack([one.square().sum(dim=(1, 2)) for one in maps])
    count = len(positions) * model.spec.grid[0] * model.spec.grid[1]
    mean = total / count
    model.inputs.set(mean, (square / count - mean.square()).clamp(min=0).sqrt())


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
