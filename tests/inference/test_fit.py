"""Pictures that are not square: whatever the fit, what is scored is what `predict` gives, pixel for pixel."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.config import ExtractConfig, Fit, TrainConfig
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.inference.predict import predict
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.run import train

SIZE = (24, 40)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training pictures and two test ones, wide, with depth in millimetres; some pixels have none."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows: list[dict[str, str]] = []
    for number in range(6):
        depth = rng.integers(500, 9000, SIZE).astype(np.uint16)
        depth[:3, ::2] = 0
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(root / f"{number}.png")
        Image.fromarray(depth).save(root / f"depth-{number}.png")
        split = "train" if number < 4 else "test"
        rows.append({"file_name": f"{number}.png", "split": split, "depth": f"depth-{number}.png"})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    described = {"depth": {"kind": "depth", "valid_range": [0.1, 10.0], "scale": 0.001}}
    (root / "labels.json").write_text(json.dumps(described))
    return root


@pytest.mark.parametrize(("fit", "seen"), [("squash", (24, 40)), ("pad", (24, 40)), ("crop", (24, 24))])
def test_what_is_scored_is_what_is_predicted(
    fit: Fit, seen: tuple[int, int], pictures: Path, tiny_flux_folder: Path, tmp_path: Path
) -> None:
    store = extract(
        ExtractConfig(
            dataset="images",
            data_root=str(pictures),
            backbone=str(tiny_flux_folder),
            resolution=32,
            batch_size=2,
            fit=fit,
            store=str(tmp_path / "store"),
        )
    )
    assert store.manifest.identity["fit"] == fit
    run = train(
        TrainConfig(task="depth", stores=(str(store.path),), run=str(tmp_path / "run"), steps=2, holdout=0.0)
    )
    errors: list[float] = []
    result = evaluate(run, export=tmp_path / "out")
    exported = list(json.loads((tmp_path / "out" / "predictions.json").read_text())["files"].values())
    files = [pictures / f"{number}.png" for number in (4, 5)]
    for number, prediction in enumerate(predict(run, files), start=4):
        assert prediction.array.shape == prediction.image.shape[:2] == seen
        truth = np.asarray(Image.open(pictures / f"depth-{number}.png")) * np.float64(0.001)
        left = (SIZE[1] - seen[1]) // 2
        truth = truth[:, left : left + seen[1]]
        known = truth > 0
        with Image.open(tmp_path / "out" / exported[number - 4]) as picture:
            written = np.asarray(picture)
        middle = written[:, left : left + seen[1]]
        assert written.shape == SIZE
        assert np.abs(middle - prediction.array * 1000).max() <= 1
        assert np.delete(written, slice(left, left + seen[1]), axis=1).sum() == 0  # nothing is known of it
        errors.append(float(np.mean(np.abs(prediction.array[known] - truth[known]) / truth[known])))
    assert result.scores["abs_rel"] == pytest.approx(np.mean(errors), rel=1e-4)
