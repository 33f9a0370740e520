"""Filling in what a configuration leaves open: the defaults of the data set and of the backbone."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from mmdiff_cache.backbones.info import default_attention
from mmdiff_cache.backbones.registry import BACKBONES, MAX_TEXT_LENGTH, describe
from mmdiff_cache.config import ExtractConfig, data_folder
from mmdiff_cache.datasets.prompts import EMPTY
from mmdiff_cache.datasets.registry import find_dataset
from mmdiff_cache.encoders.registry import ENCODERS, describe_encoder
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.extraction.drawing import resolve_generation
from mmdiff_cache.extraction.measured import device_type
from mmdiff_cache.extraction.memory import choose_text_pass
from mmdiff_cache.store.manifest import Manifest

TOKENS_A_BATCH = 4096
LARGEST_BATCH = 8
"""Default batch: as many samples as give 4096 tokens a timestep, at most 8 (4 at 512 px, 1 at 1024 px)."""
PARTITION = 64
"""Default samples a partition, rounded up to whole batches."""


def resolve(config: ExtractConfig) -> ExtractConfig:
    """Fill every None with the default of the data set or the backbone; paths become absolute.

    Raises ConfigError for an unknown data set, split, layer, prompt rule or a resolution that does not fit.
    """
    config = ExtractConfig.from_json(config.to_json())  # lists and paths from Python become what is stored
    entry = find_dataset(config.dataset)
    name = config.backbone or entry.backbone
    info = describe(name)
    there = tuple(entry.splits_in(config.data_root))
    splits = config.splits or there
    _check_splits(splits, (*there, *entry.more_splits), config.dataset)
    info.check_layers(config.layers or ())
    resolution = config.resolution or entry.resolution or info.resolution
    rows, columns = info.token_grid(resolution)
    batch_size, partition_size = _batching(config, rows * columns)
    quantisation = config.quantisation or "none"
    attention = config.attention or default_attention(info)
    info.check_attention(attention)
    if config.guidance is not None and info.guidance is None:
        raise ConfigError(f"{info.name} takes no guidance scale; leave out guidance={config.guidance:g}")
    guidance = info.guidance if config.guidance is None else config.guidance
    if entry.drawn and (config.draws > 1 or config.flip):
        raise ConfigError("drawn pictures have one variant; leave out draws and flip, and draw more of them")
    return replace(
        config,
        prompts=_absolute(config.prompts) if entry.drawn and config.prompts != EMPTY else config.prompts,
        generation=resolve_generation(config, entry, info, guidance),
        data_root=None if config.data_root is None else _absolute(config.data_root),
        splits=splits,
        backbone=name if name in BACKBONES else info.source,
        layers=config.layers or info.layers,
        timesteps=config.timesteps or info.timesteps,
        concepts=entry.concepts if config.concepts is None else config.concepts,
        discriminative=_encoders(config.discriminative, resolution),
        resolution=resolution,
        guidance=guidance,
        text_length=_text_length(config.text_length or info.text_length),
        dtype=config.dtype or info.dtype,
        quantisation=quantisation,
        attention=attention,
        compile=_compiles(config.device, quantisation) if config.compile is None else config.compile,
        text_pass=config.text_pass or choose_text_pass(info, config.device),
        batch_size=batch_size,
        partition_size=partition_size,
        store=_absolute(config.store or str(data_folder() / config.dataset / info.name)),
    )


def recorded(manifest: Manifest, store: Path) -> ExtractConfig:
    """The configuration that a store at this place was planned with, to finish it or to make it again."""
    config = ExtractConfig.from_json(manifest.config)
    # the manifest's keys are sorted, and the order of vocabularies is a part of the schema
    words = {vocabulary.name: vocabulary.concepts for vocabulary in manifest.schema.vocabularies}
    return replace(config, concepts=words, store=str(store))


def _compiles(device: str, quantisation: str) -> bool:
    return quantisation == "none" and device_type(device) == "cuda"


def _text_length(tokens: int) -> int:
    if tokens > MAX_TEXT_LENGTH:
        raise ConfigError(
            f"text_length must be at most {MAX_TEXT_LENGTH}, the limit of the pipelines, got {tokens}"
        )
    return tokens


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _check_splits(splits: Iterable[str], there: Sequence[str], dataset: str) -> None:
    for split in splits:
        if split not in there:
            raise ConfigError(f"split {split!r} is not one of {dataset}: {', '.join(there)}")


def _encoders(names: Iterable[str], resolution: int) -> tuple[str, ...]:
    """Known encoders by name, others by folder. Raises ConfigError unless they divide the picture."""
    encoders = {name: describe_encoder(name) for name in names}
    for encoder in encoders.values():
        encoder.grid(resolution)
    return tuple(name if name in ENCODERS else encoder.source for name, encoder in encoders.items())


def _batching(config: ExtractConfig, tokens: int) -> tuple[int, int]:
    """Batch and partition size; a default gives way to the one that was chosen."""
    batch = config.batch_size or max(1, min(LARGEST_BATCH, TOKENS_A_BATCH // tokens))
    partition = config.partition_size or math.ceil(PARTITION / batch) * batch
    if config.batch_size is None:
        batch = next(size for size in range(batch, 0, -1) if partition % size == 0)
    return batch, partition
