"""Baselines are what they say: each recomputed here in another way, or true by how it is made."""

from pathlib import Path

import numpy as np
import pytest

from mmdiff_cache.errors import StoreError
from mmdiff_cache.loader import CachedFeatureDataset
from mmdiff_cache.scenes import render_scene
from mmdiff_cache.tasks import TASKS
from mmdiff_cache.training.baselines import Fitting, baselines_for
from mmdiff_cache.training.evaluate import evaluate, train_baselines
from mmdiff_cache.training.run import load_run, store_of, train
from tests.learnable import GRID, PATCH, make_schema, write_scenes_store, write_store
from tests.training.conftest import small_config

SIDE = GRID * PATCH


@pytest.fixture(scope="module")
def scenes_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes_store(tmp_path_factory.mktemp("stores") / "scenes")


def fitting(store: Path, task: str) -> Fitting:
    label = TASKS[task].label
    training = CachedFeatureDataset(store, labels=(label,), indices=range(1, 7))
    reader = training.store["test"]
    data_set = training.store.manifest.config["dataset"]
    return Fitting(
        task=TASKS[task], label=reader.label_specs[label], data_set=data_set, training=training, reader=reader
    )


def predictions(store: Path, task: str, name: str, size: tuple[int, int] = (SIDE, SIDE)) -> list[np.ndarray]:
    found = baselines_for(fitting(store, task))[name]
    batch = CachedFeatureDataset(store, "test", labels=(TASKS[task].label,)).batch(range(4))
    return list(found(batch, [size] * 4))


def training_labels(store: Path, label: str) -> np.ndarray:
    return CachedFeatureDataset(store).reader.labels(label, range(1, 7))


def test_which_baselines_there_are(scenes_store: Path, learnable_store: Path) -> None:
    names = {task: list(baselines_for(fitting(scenes_store, task))) for task in TASKS}
    assert names == {
        "segmentation": ["position only", "perfect masks, one guessed class"],
        "material": ["position only", "perfect masks, one guessed class"],
        "saliency": [
            "position only",
            "blob in the centre",
            "nearest object",
            "largest object",
            "all objects",
        ],
        "depth": ["position only"],
    }
    assert list(baselines_for(fitting(learnable_store, "segmentation"))) == ["position only"]


def test_position_only_takes_the_majority_class_of_each_pixel(learnable_store: Path) -> None:
    labels = training_labels(learnable_store, "segmentation")
    found = predictions(learnable_store, "segmentation", "position only")
    for row, column in [(5, 5), (9, 30), (31, 0)]:
        values = labels[:, row, column]
        assert found[0][row, column] == np.bincount(values[values != 255]).argmax()
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_position_only_takes_the_median_of_the_valid_depths(
    learnable_store: Path, scenes_store: Path
) -> None:
    for store in (learnable_store, scenes_store):
        labels = training_labels(store, "depth")
        found = predictions(store, "depth", "position only")[0]
        assert np.isfinite(found).all()
        for row, column in [(1, 1), (12, 20), (31, 31)]:
            valid = np.sort(labels[:, row, column][labels[:, row, column] > 0.1])
            if valid.size:
                assert found[row, column] == valid[(valid.size - 1) // 2]
            else:
                assert found[row, column] == np.median(labels[labels > 0.1])


def test_position_only_takes_the_share_of_salient_pixels(learnable_store: Path) -> None:
    labels = training_labels(learnable_store, "saliency")
    found = predictions(learnable_store, "saliency", "position only")[0]
    np.testing.assert_allclose(found[5], (labels[:, 5] == 1).mean(axis=0), atol=1e-6)
    assert found[0].max() == 0  # void everywhere


def test_lookups_stretch_to_other_sizes(learnable_store: Path) -> None:
    small = predictions(learnable_store, "segmentation", "position only")[0]
    large = predictions(learnable_store, "segmentation", "position only", (2 * SIDE, 3 * SIDE))[0]
    np.testing.assert_array_equal(large, small.repeat(2, axis=0).repeat(3, axis=1))


@pytest.mark.parametrize(("task", "first"), [("segmentation", 2), ("material", 2)])
def test_the_guessed_class_is_right_about_everything_but_the_kind(
    scenes_store: Path, task: str, first: int
) -> None:
    labels = training_labels(scenes_store, TASKS[task].label)
    objects = labels[(labels >= first) & (labels != 255)]
    commonest = np.bincount(objects).argmax()
    reader = fitting(scenes_store, task).reader
    for number, guess in enumerate(predictions(scenes_store, task, "perfect masks, one guessed class")):
        truth = reader.original_label(TASKS[task].label, number)
        on_object = (truth >= first) & (truth != 255)
        assert (guess[on_object] == commonest).all()
        assert np.array_equal(guess[~on_object], truth[~on_object])


def test_object_masks_are_those_of_the_scenes(scenes_store: Path) -> None:
    nearest, largest, everything = (
        predictions(scenes_store, "saliency", name)
        for name in ("nearest object", "largest object", "all objects")
    )
    for number in range(4):
        scene = render_scene("test", number, SIDE)
        depths = np.where(scene.instance_mask > 0, scene.depth, np.inf)
        close = scene.instance_mask[np.unravel_index(depths.argmin(), depths.shape)]
        assert len(scene.objects) == 1 or nearest[number].sum() <= everything[number].sum()
        assert np.array_equal(everything[number] > 0, scene.instance_mask > 0)
        counts = np.bincount(scene.instance_mask.ravel(), minlength=2)[1:]
        assert largest[number].sum() == counts.max()
        if len(scene.objects) == 1:
            assert np.array_equal(nearest[number] > 0, scene.instance_mask == close)


def test_the_blob_is_in_the_middle(learnable_store: Path) -> None:
    blob = predictions(learnable_store, "saliency", "blob in the centre", (41, 61))[0]
    assert np.unravel_index(blob.argmax(), blob.shape) == (20, 30)
    np.testing.assert_allclose(blob, blob[::-1, ::-1], atol=1e-6)


def test_scenes_of_another_world_are_refused(tmp_path: Path) -> None:
    """Sample ids of scenes, but labels that were never rendered."""
    store = write_store(tmp_path / "store", train=8, test=4, dataset="scenes", schema=make_schema())
    with pytest.raises(StoreError, match=r"scenes-test-000000 .* is not what this version renders"):
        predictions(store, "saliency", "all objects")


def test_trained_baselines_are_trained_once_with_equal_steps(scenes_store: Path, tmp_path: Path) -> None:
    run = train(small_config(scenes_store, tmp_path / "run", steps=2, batch_size=2))
    names = {"VAE latent, same head", "small CNN on pixels"}
    before = evaluate(run)
    assert not names & set(before.baselines)
    after = evaluate(run, with_trained_baselines=True)
    assert names <= set(after.baselines)
    assert after.scores == before.scores
    folders = {entry.name for entry in (run.path / "baselines").iterdir()}
    assert folders == {"segmentation-latents", "segmentation-images"}
    for name in folders:
        other = load_run(run.path / "baselines" / name)
        assert other.finished
        assert (other.config.steps, other.config.batch_size, other.config.task) == (2, 2, "segmentation")
        assert (other.config.seed, other.config.holdout) == (run.config.seed, run.config.holdout)
    written = {path: path.stat().st_mtime_ns for path in (run.path / "baselines").rglob("*.safetensors")}
    train_baselines(run, store_of(run))
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert names <= set(evaluate(run).baselines)
    table = str(after)
    assert table.index("ema weights") < table.index("position only") < table.index("small CNN on pixels")
    assert "miou_shapes" in table.splitlines()[0]
    assert table.splitlines()[3].split()[:3] == ["miou_shapes", "sky", "ground"]


def test_each_task_of_a_run_has_trained_baselines_of_its_own(learnable_store: Path, tmp_path: Path) -> None:
    run = train(small_config(learnable_store, tmp_path / "run", task="segmentation+depth", steps=2))
    evaluate(run, task="segmentation", with_trained_baselines=True)
    assert set(evaluate(run, task="depth").baselines) == {"position only"}
    found = evaluate(run, task="depth", with_trained_baselines=True)
    latents = load_run(run.path / "baselines" / "depth-latents")
    assert latents.config.task == "depth"
    assert found.baselines["VAE latent, same head"] == evaluate(latents).scores


def test_a_baseline_run_is_scored_beside_the_other_one(learnable_store: Path, tmp_path: Path) -> None:
    run = train(small_config(learnable_store, tmp_path / "run", source="latents", steps=1, batch_size=2))
    result = evaluate(run)
    assert result.source == "latents"
    assert "source latents" in str(result)
