"""Captions for a data set: read each picture, have it described, append the line."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.captioning.caption_file import CaptionFile, read_captions
from mmdiff_cache.config import Config
from mmdiff_cache.datasets.base import Dataset
from mmdiff_cache.datasets.registry import find_dataset
from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.records import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionConfig(Config):
    """Which pictures are described, by which model, into which file."""

    dataset: str
    out: str
    data_root: str | None = None
    splits: tuple[str, ...] | None = None
    limit: int | None = None
    """The first N samples of every split."""
    model: str = "google/gemma-3-4b-it"
    """A repository on the hub, or a folder."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "auto"
    max_tokens: int = 128
    """Tokens of a caption at most."""
    batch_size: int = 1
    """Pictures at once. With 1 a caption depends on its picture alone; more are faster on a GPU."""

    def __post_init__(self) -> None:
        for name in ("limit", "max_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Captions:
    """What a run of `caption` left."""

    path: Path
    total: int
    """Samples that were asked for."""
    unreadable: Mapping[str, str]
    """Those without a caption because their picture cannot be used, each with the reason."""

    def __str__(self) -> str:
        return f"captions of {self.total - len(self.unreadable):,} of {self.total:,} samples in {self.path}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """One sample of a data set."""

    sample_id: str
    split: str
    index: int


def caption(config: CaptionConfig, progress: Progress | None = None) -> Captions:
    """Describe every picture that has no line in the file yet. Safe to run again, and to interrupt.

    The model is loaded only when something is left to do. Batches are cut from the plan, so that an
    interruption changes no caption. A picture that cannot be read gets no line.
    Raises ConfigError when the file was made otherwise, DataError for a data set that cannot be used,
    BackboneError when the model is missing.
    """
    path = Path(config.out).expanduser().absolute()
    dataset, places = _open(config)
    done = read_captions(path)
    size = config.batch_size
    batches = [places[start : start + size] for start in range(0, len(places), size)]
    left = [batch for batch in batches if any(place.sample_id not in done for place in batch)]
    unreadable: dict[str, str] = {}
    if left:
        unreadable = _describe(config, path, dataset, left, len(places), progress)
    return Captions(path=path, total=len(places), unreadable=unreadable)


def _open(config: CaptionConfig) -> tuple[Dataset, list[_Place]]:
    entry = find_dataset(config.dataset)
    if entry.drawn:
        raise ConfigError(f"data set {entry.name!r} has its prompts, and no pictures to describe")
    splits = tuple(entry.splits_in(config.data_root))
    for split in config.splits or ():
        if split not in splits:
            raise ConfigError(f"split {split!r} is not one of {entry.name}: {', '.join(splits)}")
    dataset = entry.open(config.data_root, entry.resolution or describe(entry.backbone).resolution)
    places: dict[str, _Place] = {}
    for split in config.splits or splits:
        for index, sample_id in enumerate(dataset.sample_ids(split)[: config.limit]):
            if sample_id in places:
                raise DataError(
                    f"sample {sample_id!r} is in the splits {places[sample_id].split} and {split}; "
                    "caption one --split at a time, each into its own file"
                )
            places[sample_id] = _Place(sample_id=sample_id, split=split, index=index)
    return dataset, list(places.values())


def _describe(
    config: CaptionConfig,
    path: Path,
    dataset: Dataset,
    batches: list[list[_Place]],
    total: int,
    progress: Progress | None,
) -> dict[str, str]:
    """Caption what is left; the samples that cannot be read, with the reason."""
    from mmdiff_cache.captioning import captioner  # transformers

    folder = captioner.locate_model(config.model)
    made_by = {
        "model": config.model,
        "weights_sha256": captioner.hash_model(folder),
        "instruction": captioner.INSTRUCTION,
        "decoding": "greedy",
        "max_tokens": config.max_tokens,
        "dtype": config.dtype,
        "batch_size": config.batch_size,
    }
    unreadable: dict[str, str] = {}
    with CaptionFile(path, made_by) as file:
        written = read_captions(path)
        model = captioner.load_captioner(
            folder, device=config.device, dtype=config.dtype, max_tokens=config.max_tokens
        )
        done, begun, first = len(written), time.monotonic(), len(written)
        for batch in batches:
            images = _read(dataset, batch, unreadable)
            texts = model(list(images.values())) if images else []
            for sample_id, text in zip(images, texts, strict=True):
                if sample_id not in written:
                    file.add(sample_id, text)
            done += sum(place.sample_id not in written for place in batch)
            if progress is not None:
                speed = (done - first) / (time.monotonic() - begun)
                progress(done, total, f"{batch[0].split}, {speed:.3g} pictures/s")
    return unreadable


def _read(dataset: Dataset, batch: list[_Place], unreadable: dict[str, str]) -> dict[str, NDArray[np.uint8]]:
    """The pictures of a batch by sample id; those that cannot be used go to `unreadable`."""
    images: dict[str, NDArray[np.uint8]] = {}
    for place in batch:
        try:
            images[place.sample_id] = dataset.load(place.split, place.index).image
        except DataError as error:
            unreadable[place.sample_id] = str(error)
            logger.warning("sample %s gets no caption: %s", place.sample_id, error)
    return images
