"""Stage two with a discriminative encoder: trained from the store, evaluated, and applied to new pictures."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdiff_cache.cli.app import run as command
from mmdiff_cache.config import ExtractConfig, TrainConfig
from mmdiff_cache.datasets.registry import find_dataset
from mmdiff_cache.errors import BackboneError, CheckpointError, ConfigError
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.inference.predict import load_model, predict
from mmdiff_cache.loader import CachedFeatureDataset
from mmdiff_cache.models.mmdiff import ModelSpec
from mmdiff_cache.store.convert import Selection, convert, plan_conversion
from mmdiff_cache.store.reader import Store, open_store
from mmdiff_cache.training.build import open_dataset, set_up
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.resolve import resolve
from mmdiff_cache.training.run import Run, train
from mmdiff_cache.training.scoring import predict_batch
from tests.tiny_dinov3 import CHANNELS

NAME = "tiny-dinov3"
TWO_BLOCKS = 2 * CHANNELS


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, tiny_flux_folder: Path, tiny_dinov3_folder: Path
) -> Store:
    """Four training and three test scenes of 32 pixels: 4 x 4 tokens, 2 x 2 patches."""
    return extract(
        ExtractConfig(
            splits=("train", "test"),
            limit=4,
            resolution=32,
            batch_size=2,
            partition_size=2,
            backbone=str(tiny_flux_folder),
            layers=("single.1",),
            timesteps=(0.26,),
            discriminative=(str(tiny_dinov3_folder),),
            store=str(tmp_path_factory.mktemp("stores") / "scenes"),
        )
    )


def config_for(store: Store, folder: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "task": "segmentation",
        "stores": (str(store.path),),
        "run": str(folder),
        "steps": 2,
        "batch_size": 2,
        "decoder": "linear",
        "discriminative": (NAME,),
    }
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(config_for(store, tmp_path_factory.mktemp("runs") / "with"))


def test_the_loader_puts_the_blocks_side_by_side(store: Store) -> None:
    data = CachedFeatureDataset(store, discriminative=[NAME], memory=1 << 20)
    stored = store["train"].discriminative_features(NAME, range(4))
    for _ in ("read", "held in memory"):
        batch = data.batch([2, 0])
        (maps,) = batch.discriminative
        assert maps.shape == (2, TWO_BLOCKS, 2, 2)
        for row, sample in enumerate([2, 0]):
            for block in range(2):
                part = maps[row, block * CHANNELS : (block + 1) * CHANNELS]
                np.testing.assert_array_equal(part, stored[sample, block].transpose(2, 0, 1))
    assert torch.equal(data[1][f"discriminative/{NAME}"], data.batch([1]).discriminative[0][0])


@pytest.mark.parametrize("concepts", ["none", "segmentation"])
def test_an_encoder_adds_its_channels_to_the_guidance(store: Store, tmp_path: Path, concepts: str) -> None:
    def guidance(names: tuple[str, ...]) -> tuple[int, int]:
        config = resolve(config_for(store, tmp_path / "run", concepts=concepts, discriminative=names))
        spec = set_up(config).spec
        assert isinstance(spec, ModelSpec)
        return spec.concepts, sum(spec.discriminative)

    words = 0 if concepts == "none" else len(store["train"].vocabularies[concepts])
    assert guidance(()) == (words, 0)
    assert guidance((NAME,)) == (words, TWO_BLOCKS)


def test_predictions_depend_on_it(trained: Run, store: Store) -> None:
    model = load_model(trained)
    batch = open_dataset(trained.config, store, "test").batch([0])
    sizes = [(32, 32)]
    blind = dataclasses.replace(batch, discriminative=(torch.zeros_like(batch.discriminative[0]),))
    outputs = [predict_batch(model.model, model.task, one, sizes)[0] for one in (batch, blind)]
    assert not np.array_equal(*outputs)
    with pytest.raises(ConfigError, match="guidance maps of"):
        predict_batch(model.model, model.task, dataclasses.replace(batch, discriminative=()), sizes)


def test_a_stored_picture_is_predicted_as_it_is_evaluated(trained: Run, store: Store) -> None:
    dataset, model = open_dataset(trained.config, store, "test"), load_model(trained)
    pictures = [find_dataset("scenes").open(None, 32).load("test", index) for index in (3, 0, 1)]
    for index, prediction in zip((3, 0, 1), predict(model, pictures), strict=True):
        (cached,) = predict_batch(model.model, model.task, dataset.batch([index]), [(32, 32)])
        assert np.array_equal(prediction.array, cached)
    assert [encoder.info.name for encoder in model.extractor.encoders] == [NAME]
    assert evaluate(trained).samples == 4


def test_a_run_without_it_loads_no_encoder(store: Store, tmp_path: Path) -> None:
    model = load_model(train(config_for(store, tmp_path / "run", discriminative=())))
    predict(model, [find_dataset("scenes").open(None, 32).load("test", 0)])
    assert model.extractor.encoders == ()


def test_a_latent_may_have_it_beside_and_a_picture_may_not(store: Store, tmp_path: Path) -> None:
    run = train(config_for(store, tmp_path / "latents", source="latents"))
    picture = find_dataset("scenes").open(None, 32).load("test", 0)
    (prediction,) = predict(load_model(run), [picture])
    batch = open_dataset(run.config, store, "test").batch([0])
    (cached,) = predict_batch(load_model(run).model, load_model(run).task, batch, [(32, 32)])
    assert np.array_equal(prediction.array, cached)
    with pytest.raises(ConfigError, match="source 'images' uses the pictures alone"):
        train(config_for(store, tmp_path / "images", source="images"))


def test_a_name_that_is_not_stored_is_refused_with_those_that_are(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--task", "depth", "--store", str(store.path), "--run", str(tmp_path / "run")]
    assert command([*arguments, "--set", "discriminative=dinov3-vitb16"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "discriminative encoder 'dinov3-vitb16' is not in" in shown
    assert f"stored: {NAME}" in shown
    assert not (tmp_path / "run").exists()


def test_another_encoder_of_the_same_name_is_refused(
    trained: Run, store: Store, tiny_dinov3_folder: Path, tmp_path: Path
) -> None:
    """By predict, by evaluate on a store made with it, and where it was dropped."""
    copy = Path(shutil.copytree(tiny_dinov3_folder, tmp_path / NAME))
    tensors = load_file(copy / "model.safetensors")
    tensors["norm.bias"] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    model = load_model(trained)
    model.extraction = dataclasses.replace(model.extraction, discriminative=(str(copy),))
    with pytest.raises(BackboneError, match="features of another tiny-dinov3: its weights_sha256 was"):
        predict(model, [find_dataset("scenes").open(None, 32).load("test", 0)])
    config = ExtractConfig.from_json(store.manifest.config)
    other = extract(dataclasses.replace(config, discriminative=(str(copy),), store=str(tmp_path / "other")))
    assert other.manifest.fingerprint == store.manifest.fingerprint
    with pytest.raises(CheckpointError, match="was trained with weights of tiny-dinov3 "):
        evaluate(trained, store=other.path)
    dropped = convert(plan_conversion(store.path, tmp_path / "dropped", Selection(discriminative=[])))
    with pytest.raises(CheckpointError, match="has absent"):
        evaluate(trained, store=dropped.path)
    assert open_store(tmp_path / "dropped").samples_done == 8
