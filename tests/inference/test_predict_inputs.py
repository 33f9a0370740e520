"""New pictures are read as the cache was: a stored one gets the prediction of its stored features."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmdiff_cache.config import ConceptMapsConfig, ExtractConfig, TrainConfig
from mmdiff_cache.datasets.registry import find_dataset
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.inference.gallery import concept_sheet, show
from mmdiff_cache.inference.predict import load_model, predict
from mmdiff_cache.store.convert import Selection, convert, plan_conversion
from mmdiff_cache.store.reader import Store, open_store
from mmdiff_cache.training.build import open_dataset
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.run import Run, train
from mmdiff_cache.training.scoring import predict_batch

ENCODER = "tiny-dinov3"


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, tiny_flux_folder: Path, tiny_dinov3_folder: Path
) -> Store:
    """Four training and three test scenes in two draws, each also mirrored; attention maps and an encoder."""
    return extract(
        ExtractConfig(
            splits=("train", "test"),
            limit=4,
            resolution=32,
            batch_size=2,
            partition_size=2,
            backbone=str(tiny_flux_folder),
            layers=("single.1", "single.3"),
            timesteps=(0.52, 0.001),
            discriminative=(str(tiny_dinov3_folder),),
            cross_attention=True,
            draws=2,
            flip=True,
            store=str(tmp_path_factory.mktemp("stores") / "scenes"),
        )
    )


@pytest.fixture(scope="module")
def attended(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same scenes without concept vocabularies."""
    config = ExtractConfig.from_json(store.manifest.config)
    folder = tmp_path_factory.mktemp("stores") / "attended"
    return extract(replace(config, concepts={}, flip=False, store=str(folder)))


def trained(store: Store, folder: Path, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "task": "depth",
        "stores": (str(store.path),),
        "run": str(folder),
        "steps": 2,
        "batch_size": 2,
        "decoder": "linear",
        "learning_rate": 1e-2,
        **changes,
    }
    return train(TrainConfig(**values))


SWITCHES: Mapping[str, Mapping[str, Any]] = {
    "augment": {},
    "stack": {"variant_use": "stack", "timesteps": (0.52,)},
    "second draw": {"variant_use": "stack", "variants": (1,)},
    "repeated": {"timesteps": (0.001, 0.001)},
    "maps": {
        "concept_maps": ConceptMapsConfig(blocks=("double.0",), temperature=2.0, reading="mean_then_softmax"),
        "timesteps": (0.001,),
    },
    "alone": {"source": "discriminative", "discriminative": (ENCODER,), "layers": ("3",)},
    "standardised": {"standardise": True, "drop_channels": (5, 17), "discriminative": (ENCODER,)},
}


def check_predictions(store: Store, run: Run) -> None:
    """Predictions of stored scenes are, bit for bit, those of their stored features."""
    dataset, model = open_dataset(run.config, store, "test"), load_model(run)
    scenes = find_dataset("scenes").open(None, 32)
    pictures = [scenes.load("test", index) for index in (3, 0, 1)]
    for index, prediction in zip((3, 0, 1), predict(model, pictures), strict=True):
        (cached,) = predict_batch(model.model, model.task, dataset.batch([index]), [(32, 32)])
        assert np.array_equal(prediction.array, cached)
    assert evaluate(run).samples == 4


@pytest.mark.parametrize("name", SWITCHES)
def test_a_stored_picture_is_predicted_as_it_is_evaluated(store: Store, tmp_path: Path, name: str) -> None:
    check_predictions(store, trained(store, tmp_path / "run", **SWITCHES[name]))


@pytest.mark.parametrize(
    "how",
    [{"concept_maps": ConceptMapsConfig(timesteps=(0.52,), blocks=("double.1",))}, {"variant_use": "stack"}],
    ids=["one block", "stacked"],
)
def test_so_is_one_with_attention_maps(attended: Store, tmp_path: Path, how: Mapping[str, Any]) -> None:
    check_predictions(attended, trained(attended, tmp_path / "run", concepts="cross_attention", **how))


def test_the_first_stored_draw_need_not_be_number_0(store: Store, tmp_path: Path) -> None:
    second = convert(plan_conversion(store.path, tmp_path / "second", Selection(variants=[3, 1])))
    assert [(v.noise_draw, v.flipped) for v in second["test"].variants] == [(1, False), (1, True)]
    check_predictions(second, trained(second, tmp_path / "run"))


def test_shuffled_maps_are_evaluated_and_never_predicted(store: Store, tmp_path: Path) -> None:
    run = trained(store, tmp_path / "run", concept_maps=ConceptMapsConfig(shuffled=True))
    assert evaluate(run).samples == 4
    with pytest.raises(ConfigError, match="trained with shuffled concept maps, a control"):
        load_model(run)


def test_the_gallery_names_what_maps_are_of(store: Store, tmp_path: Path) -> None:
    run = trained(store, tmp_path / "run", concepts="cross_attention")
    sheet = concept_sheet(show(run, "test", 2), "maps", "")
    assert sheet is not None
    assert sheet.columns == ["input", *open_store(store.path)["test"].cross_attention_blocks[-1:]]
