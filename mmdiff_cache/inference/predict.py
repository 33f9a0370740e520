"""A trained run applied to new pictures: the same backbone, noise, prompt, layers and timesteps.

A picture's noise is keyed by its id, as in a store: the path below the store's data root for a file that lies
there (as the data set `images` names it), else the file's name without its suffix. So a picture gets the same
prediction whatever it is predicted with, and a picture that is also in the store gets the features that the
store holds, bit for bit: a forward pass has the store's batch size, filled up with repeats where there are
fewer pictures.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.config import ExtractConfig, filled
from mmdiff_cache.datasets.base import safe_id
from mmdiff_cache.datasets.pictures import read_picture
from mmdiff_cache.datasets.prompts import PromptRule, open_prompts
from mmdiff_cache.datasets.registry import find_dataset
from mmdiff_cache.datasets.transforms import prepare
from mmdiff_cache.errors import BackboneError, ConfigError, DataError
from mmdiff_cache.extraction.extractor import Extractor, failures
from mmdiff_cache.extraction.run import check_encoders, load_extractor
from mmdiff_cache.fitting import PAD, asked_size, from_network, to_network
from mmdiff_cache.inference.output import Prediction, write_predictions
from mmdiff_cache.loader import CROSS_ATTENTION, NO_CONCEPTS, Batch, make_guide, picture_values, side_by_side
from mmdiff_cache.records import FeatureBatch, LabelSpec, PreparedSample, Progress, Sample
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.quantise import round_trip
from mmdiff_cache.tasks import find_task
from mmdiff_cache.training.build import Model
from mmdiff_cache.training.run import Run, device_of, kept_manifest, model_for_run, one_task
from mmdiff_cache.training.scoring import predict_batch, select

T = TypeVar("T", bound=np.generic)
Picture = str | os.PathLike[str] | Sample
"""A file, or a sample in memory, which brings its id and perhaps its prompts."""


class TrainedModel:
    """A trained run, ready to be applied; the backbone is loaded at the first picture and kept."""

    def __init__(self, run: Run, manifest: Manifest, model: Model) -> None:
        self.run = run
        self.config = run.config
        if run.config.concept_maps.shuffled:
            raise ConfigError(
                f"{run.path} was trained with shuffled concept maps, a control that is only evaluated; "
                "a new picture has no other's maps"
            )
        self.task = find_task(run.config.task, run.config.label)
        self.manifest = manifest
        self.model = model
        self.title = run.path.name
        self.extraction = ExtractConfig.from_json(manifest.config)
        self.label: LabelSpec = next(
            label.spec for label in manifest.schema.labels if label.spec.name == self.task.label
        )

    @cached_property
    def extractor(self) -> Extractor:
        """The store's backbone, capturing at the store's timesteps what this run uses.

        All stored timesteps go in one pass even where the run uses fewer, so that the numbers are the
        store's. Raises BackboneError where the weights are missing or are not those of the store.
        """
        vocabulary, stored = self.vocabulary, self.manifest.schema.layers
        words = {} if vocabulary is None else {vocabulary: filled(self.extraction.concepts)[vocabulary]}
        config = dataclasses.replace(
            self.extraction,
            layers=stored[:1] if self.config.source == "discriminative" else filled(self.config.layers),
            concepts=words,
            discriminative=self.encoders,
            cross_attention=self.config.concepts == CROSS_ATTENTION,
            draws=1 + max(self.draws),
            flip=False,
            device=device_of(self.run),
        )
        extractor = load_extractor(config, describe(filled(config.backbone)))
        for name, value in extractor.backbone.identity().items():
            stored = self.manifest.identity.get(name)
            if stored != value:
                raise BackboneError(
                    f"{self.title} has learnt from another {self.extraction.backbone}, whose {name} was "
                    f"{stored}, not {value}; put the former weights back, or extract and train again"
                )
        check_encoders(extractor, self.manifest.schema)
        return extractor

    @cached_property
    def prompts(self) -> PromptRule:
        """How the store's prompts were made."""
        return open_prompts(self.extraction.prompts, find_dataset(self.extraction.dataset).prompt_kinds)

    @property
    def vocabulary(self) -> str | None:
        """The concept list that guides the run, if any."""
        return None if self.config.concepts in (None, NO_CONCEPTS, CROSS_ATTENTION) else self.config.concepts

    @property
    def draws(self) -> tuple[int, ...]:
        """The noise draws that evaluation reads: all that are stacked, or the first that is not mirrored."""
        variants = self.manifest.schema.variants
        if self.config.variant_use == "stack":
            return tuple(variants[number].noise_draw for number in filled(self.config.variants))
        return tuple(variant.noise_draw for variant in variants if not variant.flipped)[:1]

    @property
    def encoders(self) -> tuple[str, ...]:
        """The discriminative encoders of the run, by name or folder as the store's configuration has them."""
        stored = zip(self.manifest.schema.discriminative, self.extraction.discriminative, strict=True)
        return tuple(name for encoder, name in stored if encoder.name in self.config.discriminative)

    def sample_of(self, picture: Picture) -> Sample:
        """Read a picture and give it its id. Raises DataError for a file that cannot be used."""
        if isinstance(picture, Sample):
            return picture
        path = Path(picture).expanduser()
        if not path.is_file():
            raise DataError(f"{path} is not a file; predict takes pictures")
        return Sample(sample_id=picture_id(path, self.extraction.data_root), image=read_picture(path))

    def prepared(self, sample: Sample) -> PreparedSample:
        """The sample at network size, with its prompt.

        Raises DataError where the store's prompts cannot be had.
        """
        try:
            prompt = self.prompts.prompt(sample)
        except DataError as error:
            raise DataError(
                f"{sample.sample_id} has no prompt, and {self.title} was trained with prompts "
                f"{self.extraction.prompts!r}; new pictures need a run on a store with --prompts empty"
            ) from error
        bare = Sample(sample_id=sample.sample_id, image=sample.image)
        return prepare(bare, filled(self.extraction.resolution), prompt, fit=self.extraction.fit)

    def batch(self, samples: Sequence[PreparedSample]) -> Batch:
        """One pass of the backbone over as many samples as the store had in a batch, or fewer.

        Raises BackboneError for features that are not finite.
        """
        repeats = [samples[0]] * (filled(self.extraction.batch_size) - len(samples))
        features = self.extractor([*samples, *repeats])
        for position, reason in failures(features, self.extractor.layers, self.extractor.timesteps).items():
            if position < len(samples):
                raise BackboneError(f"{samples[position].sample_id}: {reason}")
        return self._as_batch(features, samples)

    def _as_batch(self, features: FeatureBatch, samples: Sequence[PreparedSample]) -> Batch:
        """Features as the loader would hand them over."""
        count = len(samples)
        beside = () if self.config.source == "discriminative" else self.config.discriminative
        return Batch(
            hidden_states=torch.from_numpy(self._inputs(features, samples)),
            concepts=self._concepts(features, count),
            discriminative=tuple(
                side_by_side(torch.from_numpy(features.discriminative[name][:count, 0])) for name in beside
            ),
            targets={},
            indices=torch.arange(count),
            ids=tuple(sample.sample_id for sample in samples),
        )

    def _concepts(self, features: FeatureBatch, count: int) -> Float[Tensor, "B K h w"] | None:
        """The maps beside the features, read as the run's configuration says."""
        name, timesteps = self.config.concepts, filled(self.config.timesteps)
        if name in (None, NO_CONCEPTS):
            return None
        guide = make_guide(self.manifest.schema, name, self.config.concept_maps, timesteps, self.title)
        attention = name == CROSS_ATTENTION
        stored = filled(features.cross_attention) if attention else features.concept_scores[name]
        return torch.from_numpy(guide.maps(self._joined(stored[:count], filled(guide.how.timesteps))))

    def _joined(self, values: NDArray[T], timesteps: Sequence[float]) -> NDArray[T]:
        """Of values [B V T ...] the draws that are read at these timesteps, one behind the other on T."""
        steps = [self.extractor.timesteps.index(t) for t in timesteps]
        chosen = values[:, list(self.draws)][:, :, steps]
        return chosen.reshape(len(values), -1, *values.shape[3:])

    def _inputs(self, features: FeatureBatch, samples: Sequence[PreparedSample]) -> NDArray[np.generic]:
        """What the run's source gives the model, [B T L h w C]."""
        count = len(samples)
        if self.config.source == "hidden_states":
            maps16 = self._joined(features.hidden_states[:count], filled(self.config.timesteps))
            return round_trip(maps16) if self.manifest.schema.codec == "int8" else maps16
        layers = filled(self.config.layers)
        if self.config.source == "discriminative":
            (name,) = self.config.discriminative
            stored = next(one.layers for one in self.manifest.schema.discriminative if one.name == name)
            return features.discriminative[name][:count, :1, [stored.index(layer) for layer in layers]]
        if self.config.source == "latents":
            maps: NDArray[np.generic] = features.latents[:count]
        else:
            maps = picture_values(np.stack([sample.image for sample in samples]))
        return np.repeat(maps[:, None, None], len(layers), axis=2)


def load_model(
    run: Run | str | os.PathLike[str], weights: str = "ema", task: str | None = None
) -> TrainedModel:
    """A trained run, ready to be given to `predict`. Weights: `ema`, `raw` or `best`.

    `task` is one of those of a run of several.

    The store is not needed: the run keeps what it says about itself. Raises CheckpointError for a run that
    cannot be used.
    """
    opened = one_task(run if isinstance(run, Run) else Path(run), task)
    model = model_for_run(opened, weights).to(device_of(opened))
    return TrainedModel(opened, kept_manifest(opened), model)


def picture_id(path: Path, data_root: str | None) -> str:
    """The id of a file that is in no store: see the top of this module."""
    if data_root is not None and path.resolve().is_relative_to(Path(data_root).resolve()):
        return safe_id(path.resolve().relative_to(Path(data_root).resolve()))
    return safe_id(Path(path.stem))


def predict(
    run: Run | TrainedModel | str | os.PathLike[str],
    images: Sequence[Picture],
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Apply a run to pictures; one prediction each, in order, at the picture's own size.

    With `out`, a folder: colour PNG, raw array and a page are written there too. Every picture is read before
    the backbone is loaded, so a file that cannot be used costs nothing.

    Raises DataError for such a file, CheckpointError for a run that does not fit, BackboneError for missing
    weights.
    """
    model = run if isinstance(run, TrainedModel) else load_model(run)
    samples = [model.sample_of(picture) for picture in images]
    prepared = [model.prepared(sample) for sample in samples]
    predictions: list[Prediction] = []
    for positions in _runs(len(samples), filled(model.extraction.batch_size)):
        if progress is not None:
            progress(len(predictions), len(samples), "predicting")
        batch = model.batch([prepared[n] for n in positions])
        for row, sample in enumerate(samples[n] for n in positions):
            predictions.append(_predict_one(model, batch, row, sample))
    if out is None:
        return predictions
    return write_predictions(predictions, Path(out), f"{model.task.name} by {model.title}", _note(model))


def _predict_one(model: TrainedModel, batch: Batch, row: int, sample: Sample) -> Prediction:
    """One sample of a batch through the head, alone: rounding depends on how many go through together.

    Where pictures were cropped, picture and prediction are the middle square that the network saw.
    """
    fit, size = model.extraction.fit, (sample.image.shape[0], sample.image.shape[1])
    [array] = predict_batch(
        model.model, model.task, select(batch, [row]), [asked_size(size, fit)], model.config.precision
    )
    return Prediction(
        sample_id=sample.sample_id,
        task=model.task.name,
        label=model.label,
        image=to_network(sample.image, fit, PAD) if fit == "crop" else sample.image,
        array=from_network(array, size, fit),
    )


def _runs(count: int, size: int) -> Iterator[range]:
    """Positions 0 ... count - 1 in batches."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def _note(model: TrainedModel) -> str:
    layers = ", ".join(filled(model.config.layers))
    timesteps = ", ".join(f"{t:g}" for t in filled(model.config.timesteps))
    backbone = model.run.origin["backbone"]
    return f"Backbone {backbone}, layers {layers}, timesteps {timesteps}, prompts {model.extraction.prompts}."
