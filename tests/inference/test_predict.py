"""Predicting a picture gives what evaluating it from the cache gives, and touches nothing it should not."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.datasets.registry import find_dataset
from mmdiff_cache.errors import BackboneError, CheckpointError, DataError
from mmdiff_cache.inference.predict import TrainedModel, load_model, picture_id, predict
from mmdiff_cache.records import Sample
from mmdiff_cache.store.reader import Store, open_store
from mmdiff_cache.training.build import open_dataset
from mmdiff_cache.training.run import Run, model_for_run
from mmdiff_cache.training.scoring import predict_batch

TASKS = ("segmentation", "saliency", "depth")


def from_cache(run: Run, positions: list[int]) -> list[np.ndarray]:
    """What evaluation predicts for samples of the test split when they go through the head together."""
    dataset = open_dataset(run.config, open_store(run.config.stores[0]), "test")
    model = load_model(run)
    return predict_batch(model.model, model.task, dataset.batch(positions), [(32, 32)] * len(positions))


def scene(index: int) -> Sample:
    return find_dataset("scenes").open(None, 32).load("test", index)


@pytest.fixture(scope="module")
def models(runs: dict[str, Run]) -> dict[str, TrainedModel]:
    return {task: load_model(run) for task, run in runs.items()}


@pytest.mark.parametrize("task", TASKS)
def test_a_stored_picture_is_predicted_as_it_is_evaluated(
    task: str, runs: dict[str, Run], models: dict[str, TrainedModel]
) -> None:
    wanted = [4, 0, 3]
    predicted = predict(models[task], [scene(index) for index in wanted])
    for index, prediction in zip(wanted, predicted, strict=True):
        assert np.array_equal(prediction.array, from_cache(runs[task], [index])[0])
    for prediction, together in zip(predicted, from_cache(runs[task], wanted), strict=True):
        np.testing.assert_allclose(prediction.array, together, rtol=1e-5, atol=1e-6)


def test_a_file_with_the_name_of_a_sample_has_its_noise(
    runs: dict[str, Run], models: dict[str, TrainedModel], tmp_path: Path
) -> None:
    path = tmp_path / f"{scene(2).sample_id}.png"
    Image.fromarray(scene(2).image).save(path)
    Image.fromarray(scene(2).image).save(tmp_path / "renamed.png")
    same, renamed = predict(models["depth"], [path, tmp_path / "renamed.png"])
    assert np.array_equal(same.array, from_cache(runs["depth"], [2])[0])
    assert not np.array_equal(same.array, renamed.array), "another name, another noise"


def test_a_prediction_does_not_depend_on_its_company(models: dict[str, TrainedModel]) -> None:
    together = predict(models["depth"], [scene(n) for n in range(6)])
    for number in (0, 5):
        [alone] = predict(models["depth"], [scene(number)])
        assert np.array_equal(alone.array, together[number].array)


def test_a_prediction_has_the_size_of_its_picture(models: dict[str, TrainedModel]) -> None:
    picture = Sample(sample_id="wide", image=np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8))
    for task in TASKS:
        [prediction] = predict(models[task], [picture])
        assert prediction.array.shape == (40, 70)
        assert prediction.picture().shape == (40, 70, 3)


def test_ids_of_files(tmp_path: Path) -> None:
    (tmp_path / "root" / "sub").mkdir(parents=True)
    inside = tmp_path / "root" / "sub" / "a.jpg"
    inside.touch()
    assert picture_id(inside, str(tmp_path / "root")) == "sub/a.jpg"
    assert picture_id(inside, None) == "a"
    assert picture_id(inside, str(tmp_path / "elsewhere")) == "a"


def test_the_output_folder_holds_pictures_arrays_and_a_page(
    models: dict[str, TrainedModel], tmp_path: Path
) -> None:
    image = scene(0).image
    evil = "<img src=x onerror=alert(1)>"
    twins = [Sample(sample_id=name, image=image) for name in ("a b", "a_b", "../up", evil)]
    predictions = predict(models["segmentation"], twins, out=tmp_path / "out")
    written = [file for prediction in predictions for file in prediction.files]
    assert len(set(written)) == 2 * len(twins), "no file is written twice"
    assert all(file.parent == tmp_path / "out" for file in written)
    for prediction in predictions:
        picture, raw = prediction.files
        assert np.array_equal(np.load(raw), prediction.array)
        with Image.open(picture) as opened:
            assert np.array_equal(np.asarray(opened), prediction.picture())
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert all(file.name in page for file in written if file.suffix == ".png")


def test_save_writes_a_picture_anywhere(models: dict[str, TrainedModel], tmp_path: Path) -> None:
    [prediction] = predict(models["depth"], [scene(0)])
    with Image.open(prediction.save(tmp_path / "new" / "depth.png")) as opened:
        assert opened.size == (32, 32)


@pytest.mark.parametrize(
    ("name", "content", "words"), [("gone.png", None, "not a file"), ("a.png", b"no", "not a picture")]
)
def test_a_file_that_cannot_be_used_is_refused_before_the_backbone_is_loaded(
    runs: dict[str, Run], tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    model = load_model(runs["depth"])
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        predict(model, [scene(0), tmp_path / name], out=tmp_path / "out")
    assert "extractor" not in vars(model)
    assert not (tmp_path / "out").exists()


def test_prompts_that_a_new_picture_cannot_have_are_refused(runs: dict[str, Run]) -> None:
    model = load_model(runs["depth"])
    model.extraction = dataclasses.replace(model.extraction, prompts="oracle")
    with pytest.raises(DataError, match="new pictures need a run on a store with --prompts empty"):
        predict(model, [Sample(sample_id="mine", image=scene(0).image)])
    assert model.prepared(scene(0)).prompt == scene(0).prompts["oracle"]


def test_the_store_is_not_needed(runs: dict[str, Run], tmp_path: Path) -> None:
    expected = predict(load_model(runs["depth"]), [scene(0)])[0].array
    moved = tmp_path / "run"
    shutil.copytree(runs["depth"].path, moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"stores": ["/gone"]}))
    assert np.array_equal(predict(load_model(moved), [scene(0)])[0].array, expected)
    (moved / "store.json").unlink()
    with pytest.raises(CheckpointError, match="is not complete"):
        load_model(moved)


def test_a_backbone_whose_weights_changed_is_refused(
    runs: dict[str, Run], scenes_store: Store, tiny_flux_folder: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    changed = tmp_path / tiny_flux_folder.name
    shutil.copytree(tiny_flux_folder, changed)
    [weights] = (changed / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["x_embedder.bias"] = tensors["x_embedder.bias"] + 1
    save_file(tensors, weights, {"format": "pt"})
    model = load_model(runs["depth"])
    model.extraction = dataclasses.replace(model.extraction, backbone=str(changed))
    with pytest.raises(BackboneError, match="weights_sha256"):
        predict(model, [scene(0)])


def test_the_weights_that_are_asked_for_are_used(runs: dict[str, Run]) -> None:
    raw = load_model(runs["depth"], weights="raw").model.state_dict()
    wanted = model_for_run(runs["depth"], "raw").state_dict()
    averaged = load_model(runs["depth"]).model.state_dict()
    assert all(bool((raw[name] == wanted[name]).all()) for name in wanted)
    assert any(bool((raw[name] != averaged[name]).any()) for name in wanted)
