"""What can be had without features: predictors that a score has to beat before it means anything.

Those of BASELINES need no training and are fitted when a run is evaluated. Those of TRAINED are trainings of
their own, with the steps, batches, labels and losses of the run; they are kept in the run's folder.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.config import ConceptMapsConfig, TrainConfig
from mmdiff_cache.errors import StoreError
from mmdiff_cache.loader import NO_CONCEPTS, Batch, CachedFeatureDataset
from mmdiff_cache.records import LabelKind, LabelSpec
from mmdiff_cache.scenes import Scene, render_scene
from mmdiff_cache.store.reader import SplitReader
from mmdiff_cache.tasks import SUBSETS, Task
from mmdiff_cache.training import pixels
from mmdiff_cache.training.scoring import Predictor

LABELS_AT_ONCE = 64
MEDIAN_BYTES = 256 * 1024**2
"""Bytes of depth labels, evenly spaced over the training samples, that the median is taken over."""
BLOB_SIGMA = 0.25
"""Spread of the blob in the middle, as a share of the picture's sides."""
SCENES_KEPT = 16

Maps = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """What a baseline may look at: the training labels, and the split that is scored."""

    task: Task
    label: LabelSpec
    data_set: str
    training: CachedFeatureDataset
    """The samples that the run was trained on."""
    reader: SplitReader
    """The split that is scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """One row of a score table."""

    name: str
    kind: LabelKind
    fit: Callable[[Fitting], Predictor]
    data_set: str | None = None
    """The only data set it exists for, if it is not for all."""


def baselines_for(fitting: Fitting) -> dict[str, Predictor]:
    """The label-free baselines of a task on a data set, fitted, by name."""
    return {
        entry.name: entry.fit(fitting)
        for entry in BASELINES
        if entry.kind == fitting.label.kind and entry.data_set in (None, fitting.data_set)
    }


def _training_labels(fitting: Fitting, every: int = 1) -> Iterator[Maps]:
    """Labels [B H W] of the training samples, some at a time; `every` takes each n-th sample."""
    samples = fitting.training.indices[::every]
    for start in range(0, len(samples), LABELS_AT_ONCE):
        yield fitting.training.reader.labels(fitting.label.name, samples[start : start + LABELS_AT_ONCE])


def _looked_up(table: Maps) -> Predictor:
    """Answer every sample with the same map, taking the nearest of its pixels at other sizes."""

    @lru_cache(maxsize=SCENES_KEPT)
    def at(size: tuple[int, int]) -> Maps:
        rows, columns = (np.arange(n) * side // n for n, side in zip(size, table.shape, strict=True))
        return table[rows[:, None], columns[None, :]]

    def predict(batch: Batch, sizes: Sequence[tuple[int, int]]) -> list[Maps]:
        return [at(size) for size in sizes]

    return predict


def _majority_class(fitting: Fitting) -> Predictor:
    """The class that each pixel has most often."""
    counts: Maps | None = None
    for labels in _training_labels(fitting):
        found = np.stack([(labels == number).sum(axis=0) for number in range(len(fitting.label.classes))])
        counts = found if counts is None else counts + found
    assert counts is not None
    return _looked_up(counts.argmax(axis=0))


def _mean_mask(fitting: Fitting) -> Predictor:
    """How often each pixel is salient."""
    salient, known = np.float64(0), np.float64(0)
    for labels in _training_labels(fitting):
        salient = salient + (labels == 1).sum(axis=0)
        known = known + (labels != fitting.label.ignore).sum(axis=0)
    return _looked_up(np.asarray(salient / np.maximum(known, 1), np.float32))


def _median_depth(fitting: Fitting) -> Predictor:
    """The middle one of each pixel's valid depths; where it never has one, the middle of all."""
    low, high = fitting.label.valid_range or (0.0, np.inf)
    rows, columns = fitting.training.store.manifest.schema.image_size
    most = max(1, MEDIAN_BYTES // (rows * columns * 4))
    every = -(-len(fitting.training.indices) // most)
    depths = np.concatenate(list(_training_labels(fitting, every)))
    depths[(depths <= low) | (depths >= high)] = np.inf
    middle = np.median(depths[np.isfinite(depths)])
    depths.sort(axis=0)
    counts = np.isfinite(depths).sum(axis=0)
    table = np.take_along_axis(depths, np.maximum(counts - 1, 0)[None] // 2, axis=0)[0]
    return _looked_up(np.where(counts > 0, table, middle).astype(np.float32))


def _guessed_class(fitting: Fitting) -> Predictor:
    """The true label, but every object is taken for the kind that covers the most training pixels."""
    _, members = SUBSETS[fitting.data_set, fitting.label.name]
    ids = [fitting.label.classes.index(name) for name in members]
    pixels_of = sum(
        np.array([(labels == number).sum() for number in ids]) for labels in _training_labels(fitting)
    )
    guess = ids[int(np.argmax(pixels_of))]

    def predict(batch: Batch, sizes: Sequence[tuple[int, int]]) -> list[Maps]:
        truths = [fitting.reader.original_label(fitting.label.name, int(index)) for index in batch.indices]
        return [np.where(np.isin(truth, ids), guess, truth) for truth in truths]

    return predict


def _centre_blob(fitting: Fitting) -> Predictor:
    """A round blob in the middle, the same for every picture."""

    @lru_cache(maxsize=SCENES_KEPT)
    def at(size: tuple[int, int]) -> Maps:
        v, u = ((np.arange(side) + 0.5) / side - 0.5 for side in size)
        return np.exp(-(v[:, None] ** 2 + u[None, :] ** 2) / (2 * BLOB_SIGMA**2)).astype(np.float32)

    def predict(batch: Batch, sizes: Sequence[tuple[int, int]]) -> list[Maps]:
        return [at(size) for size in sizes]

    return predict


def _objects(fitting: Fitting, choose: Callable[[Scene], Maps]) -> Predictor:
    """The true masks of some of a scene's objects, which the scene is rendered again for."""

    def predict(batch: Batch, sizes: Sequence[tuple[int, int]]) -> list[Maps]:
        scenes = [_rendered(sample_id, size[0]) for sample_id, size in zip(batch.ids, sizes, strict=True)]
        for scene, index in zip(scenes, batch.indices.tolist(), strict=True):
            if not np.array_equal(
                scene.salient_mask, fitting.reader.original_label(fitting.label.name, index)
            ):
                raise StoreError(
                    f"{scene.sample_id} in {fitting.reader.path} is not what this version renders; "
                    "extract the scenes again, or use the release that did"
                )
        return [choose(scene).astype(np.float32) for scene in scenes]

    return predict


@lru_cache(maxsize=SCENES_KEPT)
def _rendered(sample_id: str, size: int) -> Scene:
    _, split, number = sample_id.split("-")
    return render_scene(split, int(number), size)


def _nearest(scene: Scene) -> Maps:
    return scene.instance_mask == 1 + int(np.argmin([one.mean_depth for one in scene.objects]))


def _largest(scene: Scene) -> Maps:
    return scene.instance_mask == 1 + int(np.argmax([one.visible_pixels for one in scene.objects]))


def _all(scene: Scene) -> Maps:
    return scene.instance_mask > 0


POSITION = "position only"
BASELINES: tuple[Baseline, ...] = (
    Baseline(name=POSITION, kind="classes", fit=_majority_class),
    Baseline(name=POSITION, kind="mask", fit=_mean_mask),
    Baseline(name=POSITION, kind="depth", fit=_median_depth),
    Baseline(name="perfect masks, one guessed class", kind="classes", fit=_guessed_class, data_set="scenes"),
    Baseline(name="blob in the centre", kind="mask", fit=_centre_blob),
    Baseline(name="nearest object", kind="mask", fit=partial(_objects, choose=_nearest), data_set="scenes"),
    Baseline(name="largest object", kind="mask", fit=partial(_objects, choose=_largest), data_set="scenes"),
    Baseline(name="all objects", kind="mask", fit=partial(_objects, choose=_all), data_set="scenes"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedBaseline:
    """A baseline that is a training of its own; `changes` is what its configuration differs in."""

    name: str
    source: str
    changes: Callable[[TrainConfig], TrainConfig]


def on_latents(config: TrainConfig) -> TrainConfig:
    """The same training on the clean VAE latent."""
    return replace(config, source="latents", aggregator=replace(config.aggregator, norm=None))


def on_images(config: TrainConfig) -> TrainConfig:
    """The same training of a small U-Net on the pictures."""
    return replace(config, source="images", learning_rate=pixels.LEARNING_RATE)


TRAINED: tuple[TrainedBaseline, ...] = (
    TrainedBaseline(name="VAE latent, same head", source="latents", changes=on_latents),
    TrainedBaseline(name="small CNN on pixels", source="images", changes=on_images),
)


def trained_config(baseline: TrainedBaseline, config: TrainConfig, run: Path) -> TrainConfig:
    """A baseline's training beside a run: equal steps and batches, no concepts, a folder inside the run's.

    What chooses among features or treats them goes back to its default.
    """
    return replace(
        baseline.changes(config),
        run=str(trained_folder(baseline, config, run)),
        layers=None if config.source == "discriminative" else config.layers,
        variants=None,
        variant_use="augment",
        concepts=NO_CONCEPTS,
        concept_maps=ConceptMapsConfig(),
        discriminative=(),
        standardise=False,
        drop_channels=(),
    )


def trained_folder(baseline: TrainedBaseline, config: TrainConfig, run: Path) -> Path:
    """Where a baseline of a run of this configuration lies; each task of a run has its own."""
    return run / "baselines" / f"{config.task}-{baseline.source}"


def trained_for(config: TrainConfig) -> Mapping[str, TrainedBaseline]:
    """The trained baselines that say something about a run: those of another source, by name."""
    return {entry.name: entry for entry in TRAINED if entry.source != config.source}
