"""From a configuration with gaps to one without: the store is found, and it and the task fill every None."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from mmdiff_cache.config import AggregatorConfig, TrainConfig, data_folder
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.loader import NO_CONCEPTS, usable_samples
from mmdiff_cache.models.aggregator import resolve_aggregator
from mmdiff_cache.models.mmdiff import default_decoder_width
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.store.reader import SplitReader, Store, open_store
from mmdiff_cache.store.summary import find_stores
from mmdiff_cache.tasks import Task, find_task

T = TypeVar("T")

TRAIN_SPLIT = "train"
SMALLEST_WIDTH = 64
HEADS = 8
WITHOUT_TRANSFORMER = ("latents", "images")
"""Sources that use nothing of the transformer, so that no concept maps go with them."""


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


def encoder_hashes(store: Store, names: Iterable[str]) -> dict[str, str]:
    """Which discriminative encoders those of a store are; the identity of hidden states does not tell."""
    stored = {encoder.name: encoder.weights_sha256 for encoder in store.manifest.schema.discriminative}
    return {f"weights of {name}": stored.get(name, "absent") for name in names}


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill every None but `run` from the task and the store; paths become absolute.

    Raises ConfigError for what the task or the store does not offer, StoreError for a store that cannot be
    read.
    """
    task = find_task(config.task, config.label)
    store = open_store(find_store(config, task))
    reader = store[TRAIN_SPLIT]
    label_spec(reader, task)
    batch_size = config.batch_size or task.batch_size
    width = config.aggregator.width or default_width(reader.channels)
    device = pick_device(config.device)
    return replace(
        config,
        stores=(str(store.path.absolute()),),
        run=None if config.run is None else str(Path(config.run).expanduser().absolute()),
        layers=_in_stored_order(reader.layers, map(reader.layer_index, config.layers or reader.layers)),
        timesteps=_in_stored_order(
            reader.timesteps, map(reader.timestep_index, config.timesteps or reader.timesteps)
        ),
        concepts=_concepts(config, task, reader),
        discriminative=_discriminative(config, reader),
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
            f"training takes exactly one store, got {len(config.stores)}: {', '.join(config.stores)}; "
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
        raise ConfigError(f"{reader.path} has no labels {task.label!r}; stored: {stored}")
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


def training_samples(reader: SplitReader, limit: int | None, label: str) -> tuple[int, ...]:
    """Positions of the training samples that may be used: of the first `limit` those with features and label.

    Raises StoreIncomplete naming the first sample among them that was never finished.
    """
    wanted = range(min(len(reader), limit or len(reader)))
    return usable_samples(reader, wanted, (label,))


def _in_stored_order(stored: tuple[T, ...], chosen: Iterable[int]) -> tuple[T, ...]:
    """The same choice gives the same model, in whatever order it was typed."""
    return tuple(stored[position] for position in sorted(set(chosen)))


def _concepts(config: TrainConfig, task: Task, reader: SplitReader) -> str:
    """The vocabulary: the one asked for, or the task's own; none for sources without transformer."""
    if config.source in WITHOUT_TRANSFORMER:
        if config.concepts not in (None, NO_CONCEPTS):
            raise ConfigError(
                f"source {config.source!r} uses nothing of the transformer, so concepts must be none, "
                f"got {config.concepts!r}"
            )
        return NO_CONCEPTS
    name = config.concepts or task.vocabulary
    if name != NO_CONCEPTS and name not in reader.vocabularies:
        stored = ", ".join(reader.vocabularies) or "none"
        raise ConfigError(
            f"concept vocabulary {name!r} is not in {reader.path}; stored: {stored}; "
            f"take one of them with --concepts, or --concepts {NO_CONCEPTS}"
        )
    return name


def _discriminative(config: TrainConfig, reader: SplitReader) -> tuple[str, ...]:
    """The encoders in stored order. Raises ConfigError for one that is not stored, and where none is used."""
    stored = tuple(reader.discriminative)
    for name in config.discriminative:
        if name not in stored:
            raise ConfigError(
                f"discriminative features {name!r} are not in {reader.path}; stored: "
                f"{', '.join(stored) or 'none'}"
            )
    if config.discriminative and config.source == "images":
        raise ConfigError("source 'images' uses the pictures alone, so discriminative must be empty")
    return _in_stored_order(stored, map(stored.index, config.discriminative))


def _aggregator(config: TrainConfig, width: int) -> AggregatorConfig:
    chosen = replace(config.aggregator, width=width)
    if config.source == "latents" and chosen.norm is None:
        chosen = replace(chosen, norm="none")
    return resolve_aggregator(chosen)


def _steps(config: TrainConfig, task: Task, reader: SplitReader, batch_size: int) -> int:
    """The task's epochs over the samples that are trained on."""
    samples = len(training_samples(reader, config.limit, task.label))
    return max(1, math.ceil(task.epochs * samples * (1 - config.holdout) / batch_size))
