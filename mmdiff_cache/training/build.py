"""From a resolved configuration to what is trained: samples, held-out samples, and the spec of the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.errors import CheckpointError, ConfigError
from mmdiff_cache.loader import CachedFeatureDataset, Inputs
from mmdiff_cache.models.mmdiff import MMDiff, ModelSpec, resolve_model
from mmdiff_cache.models.unified import OneTask, Unified, UnifiedSpec
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.store.manifest import hash_of_ids
from mmdiff_cache.store.reader import Store, open_store
from mmdiff_cache.tasks import Task, find_task, out_channels
from mmdiff_cache.training.division import divide
from mmdiff_cache.training.pixels import PIXELS_MULTIPLE, PixelSpec, PixelUNet
from mmdiff_cache.training.resolve import (
    TRAIN_SPLIT,
    Origin,
    guidance_identity,
    label_spec,
    origin,
    source_channels,
)
from mmdiff_cache.training.unified import check_same_identity, parts, task_names

Network = MMDiff | PixelUNet | Unified
"""What a training has weights of."""
Model = MMDiff | PixelUNet | OneTask
"""What answers one task."""
Spec = ModelSpec | PixelSpec | UnifiedSpec

DEPTH_SAMPLES = 256
"""Training labels, evenly spaced, that the typical depth is taken from."""
STATISTICS_SAMPLES = 256
"""Training samples, evenly spaced, whose features are measured for a standardisation."""

_KINDS: Mapping[str, tuple[type[Any], Callable[[Any], Network]]] = {
    "mmdiff": (ModelSpec, MMDiff.from_spec),
    "pixels": (PixelSpec, PixelUNet),
    "unified": (UnifiedSpec, Unified),
}


def build_model(spec: Spec) -> Network:
    """A model with fresh weights, drawn from torch's global generator."""
    return _KINDS[_kind(spec)][1](spec)


def for_task(network: Network, task: str) -> Model:
    """A network as it serves one of its tasks."""
    return network.for_task(task) if isinstance(network, Unified) else network


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
class Part:
    """One task of a training, and the samples that teach it."""

    config: TrainConfig
    """That of the task alone."""
    task: Task
    store: Store
    origin: Origin
    label: LabelSpec
    samples: CachedFeatureDataset
    """What is trained on."""
    held_out: CachedFeatureDataset | None
    """What picks the best checkpoint; None where nothing is held out."""

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint must have in common with the store to go on: its origin and its samples."""
        ids = [self.samples.reader.ids[index] for index in self.samples.indices]
        return {
            "fingerprint": self.origin.fingerprint,
            "dataset": self.origin.dataset,
            "backbone": self.origin.backbone,
            "prompts": self.origin.prompts,
            "sha256_of_ids": hash_of_ids(ids),
            **guidance_identity(self.store, self.config),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Everything a training needs besides weights."""

    config: TrainConfig
    parts: tuple[Part, ...]
    """One a task, in the order of the configuration."""
    spec: Spec

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the stores to go on; of several tasks by their names."""
        if len(self.parts) == 1:
            return dict(self.parts[0].identity)
        return {part.task.name: part.identity for part in self.parts}

    @property
    def ratio(self) -> tuple[float, ...]:
        """Of the parts' batches."""
        return self.config.mixing or (1.0,) * len(self.parts)


def check_identity(setup: Setup, stored: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError where the checkpoint at `path` was trained on other samples."""
    for part in setup.parts:
        had = stored if len(setup.parts) == 1 else stored.get(part.task.name, {})
        for name, value in part.identity.items():
            if had.get(name, value) != value:  # an earlier release did not write all of them down
                raise CheckpointError(
                    f"{path} was trained on a store whose {name} is {had[name]}, that of "
                    f"{part.store.path} is {value}; train anew with another --run"
                )


def set_up(config: TrainConfig) -> Setup:
    """Open the stores of a resolved configuration and split their training samples."""
    names = task_names(config)
    if config.disjoint and len(set(config.stores)) > 1:
        raise ConfigError(
            f"disjoint deals the samples of one store to {len(names)} tasks, got {len(config.stores)} stores"
        )
    tasks = tuple(
        _part(one, (number, len(names)) if config.disjoint else (0, 1), 1 / len(names))
        for number, one in enumerate(parts(config))
    )
    if len(tasks) > 1:
        check_same_identity(
            {
                str(one.store.path): {
                    **one.store.manifest.identity,
                    **guidance_identity(one.store, one.config),
                }
                for one in tasks
            }
        )
    return Setup(config=config, parts=tasks, spec=_spec(tasks))


def _part(config: TrainConfig, turn: tuple[int, int], memory: float) -> Part:
    """One task of a training, its turn at the samples, and its share of the memory that may keep them."""
    task, store = find_task(config.task, config.label), open_store(config.stores[0])
    reader = store[TRAIN_SPLIT]
    label = label_spec(reader, task)
    division = divide(config, reader, task.label, turn)
    share = memory * config.holdout
    return Part(
        config=config,
        task=task,
        store=store,
        origin=origin(store),
        label=label,
        samples=open_dataset(
            config, store, TRAIN_SPLIT, division.trained, share=memory - share, augment=True
        ),
        held_out=open_dataset(config, store, TRAIN_SPLIT, division.held_out, share=share)
        if config.holdout
        else None,
    )


def _spec(tasks: Sequence[Part]) -> Spec:
    """The shape of the model: of the only task, or of all."""
    specs = {one.task.name: make_spec(one.config, one.samples, one.label) for one in tasks}
    if len(specs) == 1:
        return specs[tasks[0].task.name]
    shapes = {task: spec for task, spec in specs.items() if isinstance(spec, ModelSpec)}
    if len(shapes) < len(specs):
        raise ConfigError(f"source {tasks[0].config.source!r} trains one task at a time, got {len(tasks)}")
    return UnifiedSpec.join(shapes)


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
        augment_seed=config.reading_seed if augment else None,
    )


def make_spec(config: TrainConfig, samples: CachedFeatureDataset, label: LabelSpec) -> ModelSpec | PixelSpec:
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


def fit_standardisation(network: Network, samples: Sequence[CachedFeatureDataset]) -> None:
    """Measure the mean and deviation of every (timestep, layer, channel) that a network standardises by.

    Over at most `STATISTICS_SAMPLES` training samples of each data set, evenly spaced, as evaluation reads
    them; sums are float64. A network without a standardisation is left as it is.
    """
    model = network.trunk if isinstance(network, Unified) else network
    if not isinstance(model, MMDiff) or not model.spec.standardise:
        return
    total = square = torch.zeros((), dtype=torch.float64)
    count = 0
    for dataset in samples:
        for position in range(0, len(dataset), -(-len(dataset) // STATISTICS_SAMPLES)):
            features = dataset.plain([position]).hidden_states[0]
            maps = [features[t].double() for t in range(len(features))]  # one timestep: a sample is large
            total = total + torch.stack([one.sum(dim=(1, 2)) for one in maps])
            square = square + torch.stack([one.square().sum(dim=(1, 2)) for one in maps])
            count += model.spec.grid[0] * model.spec.grid[1]
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
