"""From a configuration with gaps to one without: the store is found, and it and the task fill every None."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from mmdiff_cache.config import AggregatorConfig, TrainConfig, data_folder, filled
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.loader import CROSS_ATTENTION, NO_CONCEPTS, Inputs, settle
from mmdiff_cache.models.aggregator import PRESETS, resolve_aggregator
from mmdiff_cache.models.mmdiff import default_decoder_width
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.store.reader import SplitReader, Store, open_store
from mmdiff_cache.store.summary import find_stores
from mmdiff_cache.tasks import Task, find_task
from mmdiff_cache.training.division import samples_of_the_split
from mmdiff_cache.training.unified import parts

TRAIN_SPLIT = "train"
SMALLEST_WIDTH = 64
HEADS = 8
SHARED = ("layers", "timesteps", "variants", "concepts", "discriminative", "aggregator", "decoder_width")
"""What the tasks of a unified run read and train together."""
ABSENT = "absent"
"""Stands for what a store does not have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where the features of a store come from, as far as a trained model depends on it."""

    fingerprint: str
    """Of the store's identity: backbone, noise, prompts."""
    dataset: str
    backbone: str
    prompts: str
    """Rule of the prompts: `empty`, `scene`, `oracle` or the name of a file."""


def origin(store: Store) -> Origin:
    """Read off the manifest what a run is named by and checked against."""
    manifest = store.manifest
    return Origin(
        fingerprint=manifest.fingerprint,
        dataset=str(manifest.config.get("dataset", "unknown")),
        backbone=str(manifest.provenance.get("backbone", "unknown")),
        prompts=Path(str(manifest.config.get("prompts", "empty"))).name,
    )


def guidance_identity(store: Store, config: TrainConfig) -> Mapping[str, str]:
    """What a store's concept maps and encoders are; the identity of its hidden states does not tell.

    The same number of channels may be those of other words, or of another encoder of the same name.
    """
    schema = store.manifest.schema
    encoders = {encoder.name: encoder.weights_sha256 for encoder in schema.discriminative}
    words = {vocabulary.name: ", ".join(vocabulary.concepts) for vocabulary in schema.vocabularies}
    found = {f"weights of {name}": encoders.get(name, ABSENT) for name in config.discriminative}
    if config.concepts not in (None, NO_CONCEPTS, CROSS_ATTENTION):
        found[f"vocabulary {config.concepts}"] = words.get(config.concepts, ABSENT)
    return found


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill every None but `run` from the tasks and their stores; paths become absolute.

    Raises ConfigError for what a task or a store does not offer, or for stores that do not go together,
    StoreError for a store that cannot be read.
    """
    first, *others = [_resolve_part(one) for one in parts(config)]
    if not others:
        return first
    alone = [filled(one.steps) for one in (first, *others)]
    for other in others:
        for entry in fields(TrainConfig):
            have, want = getattr(first, entry.name), getattr(other, entry.name)
            if entry.name in SHARED and have != want:
                raise ConfigError(
                    f"one model for {first.task} and {other.task} needs the same {entry.name}, their stores "
                    f"have {have} and {want}; choose with --set {entry.name}=..."
                )
    return replace(
        first,
        task=config.task,
        stores=tuple(one.stores[0] for one in (first, *others)),
        steps=config.steps or (math.ceil(sum(alone) / len(alone)) if config.disjoint else sum(alone)),
        disjoint=config.disjoint,
        mixing=config.mixing or (1.0,) * (1 + len(others)),
        loss_weights=config.loss_weights,
    )


def _resolve_part(config: TrainConfig) -> TrainConfig:
    """Fill every None but `run` from one task and its store."""
    task = find_task(config.task, config.label)
    store = open_store(find_store(config, task))
    reader = store[TRAIN_SPLIT]
    label_spec(reader, task)
    batch_size = config.batch_size or task.batch_size
    inputs = _inputs(config, task, store)
    channels = source_channels(store, inputs)
    _check_channels(config, channels)
    of_encoder = config.source == "discriminative"
    width = config.aggregator.width or default_width(channels if of_encoder else reader.channels)
    device = pick_device(config.device)
    return replace(
        config,
        stores=(str(store.path.absolute()),),
        run=None if config.run is None else str(Path(config.run).expanduser().absolute()),
        layers=inputs.layers,
        timesteps=inputs.timesteps,
        variants=inputs.variants,
        concepts=inputs.guides[0].name if inputs.guides else NO_CONCEPTS,
        concept_maps=inputs.guides[0].how if inputs.guides else config.concept_maps,
        discriminative=inputs.discriminative,
        drop_channels=tuple(sorted(set(config.drop_channels))),
        aggregator=_aggregator(config, width),
        decoder=config.decoder or task.decoder,
        decoder_width=config.decoder_width or default_decoder_width(width),
        steps=config.steps or _steps(config, task, reader, batch_size),
        batch_size=batch_size,
        device=device,
        compile=device.startswith("cuda") if config.compile is None else config.compile,
    )


def find_store(config: TrainConfig, task: Task) -> Path:
    """The store to train from: the one that is given, or the only one under data/ that has the task's labels.

    Raises ConfigError with the lines to type where there is none or more than one.
    """
    if len(config.stores) > 1:
        raise ConfigError(
            f"one task takes exactly one store, got {len(config.stores)}: {', '.join(config.stores)}; "
            "train once for each"
        )
    if config.stores:
        return Path(config.stores[0]).expanduser()
    sound = [Path(entry.path) for entry in find_stores(data_folder()) if entry.fault is None]
    fitting = [path for path in sound if _has_labels(open_store(path), task.label)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise ConfigError(
            f"no store under {data_folder()} has training labels {task.label!r}; "
            "make one: mmdiff-cache extract --dataset scenes"
        )
    lines = "".join(f"\n  mmdiff-cache train --task {task.name} --store {path}" for path in fitting)
    raise ConfigError(f"{len(fitting)} stores have training labels {task.label!r}; choose one:{lines}")


def _has_labels(store: Store, label: str) -> bool:
    return TRAIN_SPLIT in store.splits and label in store[TRAIN_SPLIT].label_specs


def label_spec(reader: SplitReader, task: Task) -> LabelSpec:
    """What the values of a task's labels mean. Raises ConfigError if there are none, or of another kind."""
    specs = reader.label_specs
    if task.label not in specs:
        stored = ", ".join(f"{name} ({spec.kind})" for name, spec in specs.items()) or "none"
        raise ConfigError(
            f"{reader.path} has no labels {task.label!r}; stored: {stored}; take another store, or put them "
            "into this one with 'mmdiff-cache labels add'"
        )
    spec = specs[task.label]
    if spec.kind != task.kind:
        raise ConfigError(f"task {task.name} needs labels of kind {task.kind}, {spec.name!r} are {spec.kind}")
    return spec


def default_width(channels: int) -> int:
    """D: a quarter of C (768 for FLUX.1), at least 64 yet at most half of C, in multiples of the heads."""
    return max(HEADS, min(max(channels // 4, SMALLEST_WIDTH), channels // 2) // HEADS * HEADS)


def pick_device(name: str) -> str:
    """`auto` is the GPU where there is one. Raises ConfigError for a device that torch does not have."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu or cuda (cuda:1 ...), got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name} is not there; torch sees {torch.cuda.device_count()} GPU(s)")
    return name


def _inputs(config: TrainConfig, task: Task, store: Store) -> Inputs:
    """Layers from shallow to deep, timesteps from noisy to clean, and what task and store fill in.

    The same choice gives the same model, in whatever order it was typed. A store keeps the order in which
    the extraction was asked for them; but decoders take the first layer for the shallowest, and several
    stores must agree.
    """
    reader = store[TRAIN_SPLIT]
    chosen = [reader.timesteps[reader.timestep_index(t)] for t in config.timesteps or reader.timesteps]
    inputs = settle(
        reader,
        store.manifest.schema,
        source=config.source,
        layers=config.layers,
        timesteps=sorted(chosen, reverse=True),
        variants=config.variants,
        variant_use=config.variant_use,
        concepts=_concepts(config, task, reader),
        concept_maps=config.concept_maps,
        discriminative=config.discriminative,
    )
    encoders = reader.discriminative
    of_encoder = config.source == "discriminative"
    stored = encoders[inputs.discriminative[0]].layers if of_encoder else reader.layers
    return replace(
        inputs,
        layers=tuple(sorted((layer for layer in stored if layer in inputs.layers), key=_depth)),
        variants=tuple(sorted(inputs.variants)),
        discriminative=tuple(name for name in encoders if name in inputs.discriminative),
    )


def _depth(address: str) -> tuple[bool, int]:
    """What sorts blocks from shallow to deep: `double.17` comes before `single.4`."""
    kind, _, number = address.rpartition(".")
    return kind == "single", int(number) if number.isdecimal() else 0


def _concepts(config: TrainConfig, task: Task, reader: SplitReader) -> str:
    """The vocabulary: the one asked for, or the task's own; none beside another source than hidden states.

    An encoder alone is a baseline (Paper: Tab. 4), and concept maps come from the transformer.
    """
    if config.concepts is None and config.source != "hidden_states":
        return NO_CONCEPTS
    name = config.concepts or task.vocabulary
    if name not in (NO_CONCEPTS, CROSS_ATTENTION, *reader.vocabularies):
        stored = ", ".join(reader.vocabularies) or "none"
        raise ConfigError(
            f"concept vocabulary {name!r} is not in {reader.path}; stored: {stored}; "
            f"take one of them with --concepts, or --concepts {NO_CONCEPTS}"
        )
    return name


def source_channels(store: Store, inputs: Inputs) -> int:
    """Channels of what the source gives the model; 3 of a picture."""
    schema = store.manifest.schema
    if inputs.source == "discriminative":
        return store[TRAIN_SPLIT].discriminative[inputs.discriminative[0]].channels
    return {"hidden_states": schema.channels, "latents": schema.latent_channels, "images": 3}[inputs.source]


def _check_channels(config: TrainConfig, channels: int) -> None:
    """Raise ConfigError for channels to drop that the source has not, and for pictures, whose are colours."""
    if config.source == "images" and (config.standardise or config.drop_channels):
        raise ConfigError("source 'images' takes pictures as they are: leave out standardise, drop_channels")
    beyond = [channel for channel in config.drop_channels if channel >= channels]
    if beyond:
        raise ConfigError(
            f"drop_channels must lie between 0 and {channels - 1}, the channels of {config.source}, "
            f"got {beyond[0]}"
        )
    if len(set(config.drop_channels)) == channels:
        raise ConfigError(f"drop_channels names all {channels} channels of {config.source}; keep some")


def _aggregator(config: TrainConfig, width: int) -> AggregatorConfig:
    chosen = replace(config.aggregator, width=width)
    preset = PRESETS[chosen.preset]
    if all(getattr(chosen, name) not in (None, value) for name, value in preset.items()):
        raise ConfigError(
            f"aggregator.preset {chosen.preset} would decide nothing: {', '.join(preset)} are all given, as "
            "in a run's config.json, and none as it has them; --set aggregator.layer_scale=null, and so on, "
            "leaves them to the preset"
        )
    if config.source == "latents" and chosen.norm is None:
        chosen = replace(chosen, norm="none")
    return resolve_aggregator(chosen)


def _steps(config: TrainConfig, task: Task, reader: SplitReader, batch_size: int) -> int:
    """The task's epochs over the whole split, whatever the limit: sizes compare at equal steps (App. A)."""
    trained = samples_of_the_split(reader, task.label) * (1 - config.holdout)
    return max(1, math.ceil(task.epochs * trained / min(batch_size, max(trained, 1))))
