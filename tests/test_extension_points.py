"""A data set, a backbone, a task, a decoder and an aggregator of one's own, each by one entry in its
registry.

CONTRIBUTING.md describes the same five steps; here they are taken for real, and the whole path runs on them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmdiff_cache.backbones.registry import BACKBONES, BackboneEntry
from mmdiff_cache.config import AggregatorConfig, ExtractConfig, TrainConfig
from mmdiff_cache.datasets.base import Dataset
from mmdiff_cache.datasets.registry import DATASETS, DatasetEntry
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.extraction.plan import plan
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.inference.predict import predict
from mmdiff_cache.models.aggregator import Aggregation, Aggregator
from mmdiff_cache.models.decoder import Decoder
from mmdiff_cache.models.mmdiff import AGGREGATORS, DECODERS, MMDiff, ModelSpec
from mmdiff_cache.records import LabelSpec, Sample
from mmdiff_cache.tasks import TASKS
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.run import model_for_run, train

SIDE = 32


class Halves(Dataset):
    """Pictures with a bright half; the label says which pixels are bright."""

    label_specs = (LabelSpec(name="brightness", kind="classes", classes=("dark", "bright"), ignore=255),)
    canvas = (SIDE, SIDE)

    def sample_ids(self, split: str) -> Sequence[str]:
        return [f"{split}-{number}" for number in range(4)]

    def load(self, split: str, index: int) -> Sample:
        bright = np.zeros((SIDE, SIDE), np.uint8)
        bright[:, : SIDE // 2] = 1
        image = np.repeat(np.rot90(bright, index)[..., None] * np.uint8(200), 3, axis=2)
        return Sample(
            sample_id=self.sample_ids(split)[index],
            image=image,
            labels={"brightness": np.rot90(bright, index)},
        )


class MeanAggregator(Aggregator):
    """The plain mean over timesteps of a projection."""

    def __init__(
        self, *, channels: int, timesteps: int, width: int, cleanest: int, config: AggregatorConfig
    ) -> None:
        super().__init__()
        self.project = nn.Linear(channels, width)

    def aggregate(self, features: Tensor) -> Aggregation:
        fused = self.project(features.float()).mean(dim=1).permute(0, 3, 1, 2)
        batch, timesteps, rows, columns, _ = features.shape
        weights = torch.full((batch, timesteps, rows, columns), 1 / timesteps, device=features.device)
        return Aggregation(fused=fused, weights=weights)


class FirstLayer(Decoder):
    """A head on the first layer's map and nothing else."""

    def __init__(self, features: int, out_channels: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(features, out_channels, 1)

    def decode(self, features: Sequence[Tensor], guidance: Tensor | None) -> Tensor:
        return features[0]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, tiny_flux_folder: Path) -> None:
    """The five lines that a contributor writes."""
    dataset = DatasetEntry(
        name="halves",
        summary="which half is bright",
        open=lambda root, resolution: Halves(),
        splits={"train": None, "test": None},
        backbone="tiny",
        concepts={"mine": ("object", "background")},
        needs_root=False,
        resolution=SIDE,
    )
    backbone = BackboneEntry(
        name="tiny",
        summary="random weights",
        source=str(tiny_flux_folder),
        layers=("single.1", "single.3"),
        timesteps=(0.5, 0.001),
        resolution=SIDE,
        guidance=3.5,
        text_length=12,
        aggregator_width=16,
        dtype="float32",
        licence="none",
    )
    task = dataclasses.replace(
        TASKS["segmentation"], name="brightness", label="brightness", vocabulary="mine", decoder="first-layer"
    )
    monkeypatch.setitem(DATASETS, "halves", dataset)  # type: ignore[arg-type]
    monkeypatch.setitem(BACKBONES, "tiny", backbone)  # type: ignore[arg-type]
    monkeypatch.setitem(TASKS, "brightness", task)  # type: ignore[arg-type]
    monkeypatch.setitem(AGGREGATORS, "own-mean", MeanAggregator)
    monkeypatch.setitem(DECODERS, "first-layer", build_first_layer)


def build_first_layer(spec: ModelSpec) -> Decoder:
    assert spec.aggregator.width is not None
    return FirstLayer(spec.aggregator.width, spec.out_channels)


@pytest.mark.usefixtures("registered")
def test_the_whole_path_runs_on_five_parts_of_ones_own(tmp_path: Path) -> None:
    store = extract(ExtractConfig(dataset="halves", batch_size=2, store=str(tmp_path / "store")))
    assert store["train"].layers == ("single.1", "single.3")
    run = train(
        TrainConfig(
            task="brightness",
            stores=(str(store.path),),
            run=str(tmp_path / "run"),
            aggregator=AggregatorConfig(kind="own-mean", width=16),
            steps=60,
            batch_size=2,
            learning_rate=1e-2,
        )
    )
    model = model_for_run(run)
    assert isinstance(model, MMDiff)
    assert isinstance(model.decoder, FirstLayer)
    assert all(isinstance(aggregator, MeanAggregator) for aggregator in model.aggregators)
    result = evaluate(run)
    assert result.headline == "miou"
    assert set(result.scores["iou"]) == {"dark", "bright"}
    losses = [line["loss"] for line in read_metrics(run.path) if "loss" in line]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]), "it learns"
    [prediction] = predict(run, [Halves().load("test", 0)])
    assert prediction.label.classes == ("dark", "bright")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ExtractConfig(dataset="halvs"), "data set 'halvs' is not known"),
        (ExtractConfig(backbone="tinny"), "'tinny' is neither a backbone"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(config: ExtractConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(config)


def test_an_unknown_part_of_a_model_is_refused_before_a_run_folder_is_made(
    learnable_store: Path, tmp_path: Path
) -> None:
    config = TrainConfig(task="depth", stores=(str(learnable_store),), run=str(tmp_path / "run"), steps=1)
    for wrong in (
        dataclasses.replace(config, task="dept"),
        dataclasses.replace(config, decoder="dtp"),
        dataclasses.replace(config, aggregator=AggregatorConfig(kind="tokn")),
    ):
        with pytest.raises(ConfigError, match=r"known|must be one of"):
            train(wrong)
    assert not (tmp_path / "run").exists()
