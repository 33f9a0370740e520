"""Averaging over the mirrored picture: against both readings by hand, for every kind of task."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.loader import CachedFeatureDataset
from mmdiff_cache.metrics import DepthMetric, SegmentationMetric
from mmdiff_cache.store.schema import Variant
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.mirror import Mirror
from mmdiff_cache.training.run import Run, model_for_run, train
from mmdiff_cache.training.scoring import forward_batch
from tests.learnable import CLASSES, FOUR_VARIANTS, make_rich_schema, write_store
from tests.training.conftest import small_config


@pytest.fixture(scope="module")
def rich_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "rich", train=8, test=3, schema=make_rich_schema())


def run_of(store: Path, folder: Path, task: str, **changes: object) -> Run:
    return train(small_config(store, folder / task, task=task, **{"steps": 12, "variants": (0,), **changes}))


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_outputs_are_averaged_before_they_become_predictions(
    rich_store: Path, tmp_path: Path, task: str
) -> None:
    """Logits, or metres, of variant 0 and of its mirror image (2), at the labels' original sizes."""
    run = run_of(rich_store, tmp_path, task)
    model, config = model_for_run(run), run.config
    sides = [
        CachedFeatureDataset(
            rich_store, "test", concepts=config.concepts, variants=(variant,), augment_seed=0
        )
        for variant in (0, FOUR_VARIANTS.index(Variant(noise_draw=0, flipped=True)))
    ]
    reader = sides[0].reader
    label = reader.label_specs[task]
    metric = (
        DepthMetric(label.valid_range or (0, 0))
        if task == "depth"
        else SegmentationMetric(CLASSES, ignore=label.ignore)
    )
    with torch.inference_mode():
        for n in range(3):
            truth = reader.original_label(task, n)
            plain, mirrored = (
                forward_batch(model, side.batch([n]), (truth.shape[0], truth.shape[1]))[0] for side in sides
            )
            both = torch.stack([plain, torch.from_numpy(mirrored.numpy()[..., ::-1].copy())]).mean(dim=0)
            metric.update(both[0].numpy() if task == "depth" else both.argmax(dim=0).numpy(), truth)
    flipped, plainly = evaluate(run, flip=True), evaluate(run)
    key = flipped.headline
    assert flipped.scores[key] == pytest.approx(metric.scores()[key], rel=1e-5)
    assert flipped.scores != plainly.scores
    assert flipped.baselines == plainly.baselines
    assert "averaged with those of the mirrored picture" in str(flipped)
    assert (run.path / "evaluation-test-ema-flip.json").exists()


def test_twins_show_the_same_samples_and_are_read_once_a_batch(
    rich_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CachedFeatureDataset(rich_store, "test", indices=[2, 0])
    mirror, batch, reads = Mirror(data, "test"), data.batch([1, 0]), []
    original = CachedFeatureDataset.batch
    monkeypatch.setattr(
        CachedFeatureDataset, "batch", lambda self, *rest: (reads.append(rest), original(self, *rest))[1]
    )
    twins = mirror(batch)
    assert twins.ids == batch.ids == ("blocks-test-000000", "blocks-test-000002")
    expected = data.reader.hidden_states([0, 2], None, None, [2, 2])
    np.testing.assert_array_equal(twins.hidden_states.numpy(), expected)
    assert mirror(batch) is twins
    assert len(reads) == 1


def test_without_twins_it_is_refused(rich_store: Path, learnable_store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"flip needs the mirrored twin of noise draw 0, .*extract with"):
        evaluate(run_of(learnable_store, tmp_path / "plain", "depth", steps=1, variants=None), flip=True)
    for name, changes in (("stacked draws", {"variant_use": "stack"}), ("source 'latents'", {})):
        run = run_of(
            rich_store,
            tmp_path / name.split()[0],
            "depth",
            steps=1,
            variants=None,
            **(changes or {"source": "latents"}),
        )
        with pytest.raises(ConfigError, match=f"{name} have none, leave it out"):
            evaluate(run, flip=True)
