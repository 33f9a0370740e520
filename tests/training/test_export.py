"""Exported predictions are those that were scored, in files that other tools read."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.cli.app import run as command
from mmdiff_cache.errors import ConfigError, StorageError
from mmdiff_cache.fitting import onto, to_network
from mmdiff_cache.loader import CachedFeatureDataset
from mmdiff_cache.metrics import DepthMetric, SaliencyMetric, SegmentationMetric
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.export import Export, file_names, pixel_values
from mmdiff_cache.training.run import Run
from mmdiff_cache.visuals.colours import voc_palette
from tests.learnable import CLASSES

METRICS = {
    "segmentation": lambda: SegmentationMetric(CLASSES),
    "saliency": SaliencyMetric,
    "depth": lambda: DepthMetric((0.1, 40.0)),
}


def read(path: Path, task: str) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.mode == {"segmentation": "P", "saliency": "L", "depth": "I;16"}[task]
        values = np.asarray(picture)
    return {"segmentation": values, "saliency": values / 255, "depth": values / 1000}[task]


@pytest.mark.parametrize("task", list(METRICS))
def test_the_files_alone_give_the_scores(
    trained: Callable[[str], Run], learnable_store: Path, tmp_path: Path, task: str
) -> None:
    run, folder = trained(task), tmp_path / "new" / "out"
    result = evaluate(run, export=folder)
    about = json.loads((folder / "predictions.json").read_text())
    data, metric = CachedFeatureDataset(learnable_store, "test"), METRICS[task]()
    for n, sample_id in enumerate(data.reader.ids):
        metric.update(read(folder / about["files"][sample_id], task), data.reader.original_label(task, n))
    for name, value in metric.scores().items():
        if isinstance(value, float):
            assert result.scores[name] == pytest.approx(value, rel=5e-4), name
    assert about["complete"]
    assert (about["run"], about["weights"], about["split"]) == (str(run.path), "ema", "test")
    assert {path.name for path in folder.iterdir()} == {"predictions.json", *about["files"].values()}
    assert about["protocol"] == result.protocol
    assert f"predictions {folder}" in str(result)


def test_again_into_the_same_folder_and_never_into_another(
    trained: Callable[[str], Run], tmp_path: Path
) -> None:
    run, folder = trained("segmentation"), tmp_path / "out"
    evaluate(run, export=folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "blocks-test-000001.png").unlink()
    evaluate(run, export=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ConfigError, match="holds predictions with weights 'ema', not 'raw'; choose another"):
        evaluate(run, weights="raw", export=folder)
    with pytest.raises(ConfigError, match="holds predictions with run"):
        evaluate(trained("saliency"), export=folder)
    with pytest.raises(ConfigError, match="is not empty and holds no predictions"):
        evaluate(run, export=run.path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; an export is a folder"):
        evaluate(run, export=tmp_path / "file")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_disk_that_refuses_is_one_line_and_the_export_is_not_complete(
    trained: Callable[[str], Run], tmp_path: Path
) -> None:
    (tmp_path / "out" / "blocks-test-000002.png" / "in the way").mkdir(parents=True)
    run, folder = trained("segmentation"), tmp_path / "out"
    with pytest.raises(ConfigError, match="holds no predictions"):
        evaluate(run, export=folder)
    blocked = tmp_path / "second"
    evaluate(run, export=blocked)
    (blocked / "blocks-test-000002.png").unlink()
    (blocked / "blocks-test-000002.png").mkdir()
    with pytest.raises(
        StorageError, match=r"cannot write .*blocks-test-000002.png: is a directory"
    ) as caught:
        evaluate(run, export=blocked)
    assert "--run" not in str(caught.value)
    assert not json.loads((blocked / "predictions.json").read_text())["complete"]


def test_the_command_line_passes_it_all_on(
    trained: Callable[[str], Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, folder = trained("depth"), tmp_path / "out"
    words = ["evaluate", str(run.path), "--align", "lstsq", "--export", str(folder), "--json"]
    assert command(words) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["align"], said["flip"], said["export"]) == ("lstsq", False, str(folder))
    assert "(--align lstsq)" in said["protocol"]
    assert len(list(folder.glob("*.png"))) == 4
    assert command(["evaluate", str(run.path), "--flip"]) == 2
    refused = capfd.readouterr()
    assert "flip needs the mirrored twin of noise draw 0" in " ".join(refused.err.split())
    assert "Traceback" not in refused.err


def test_file_names_are_safe_and_different() -> None:
    ids = ["2007_000033", "a/b", "a_b", "A_b", "../x", "..", "", "é", "n" * 300, "n" * 301, "a b"]
    names = file_names(ids)
    assert names["2007_000033"] == "2007_000033.png"
    assert len({name.casefold() for name in names.values()}) == len(ids)
    for name in names.values():
        assert "/" not in name
        assert not name.startswith(".")
        assert len(name) < 130
    assert file_names(ids[:3])["a/b"] == names["a/b"]


def test_whole_numbers_of_a_prediction() -> None:
    depth = np.array([[0.0, 1.2344, 1.2346, 70.0, np.nan, np.inf]], np.float32)
    assert pixel_values(depth, LabelSpec(name="d", kind="depth")).tolist() == [
        [1, 1234, 1235, 65535, 0, 65535]
    ]
    mask = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert pixel_values(mask, LabelSpec(name="m", kind="mask")).tolist() == [[0, 128, 255]]


def test_the_palette_is_that_of_voc() -> None:
    """Background, aeroplane, bicycle, person, tv and void, as they are published."""
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    palette = voc_palette()
    for number, colour in {**known, 255: (224, 224, 192)}.items():
        assert tuple(palette[number]) == colour


def test_what_the_network_did_not_see_is_filled() -> None:
    whole = np.arange(35).reshape(5, 7)
    back = onto(to_network(whole, "crop", 0), (5, 7), 255)
    np.testing.assert_array_equal(back[:, 1:6], whole[:, 1:6])
    assert (back[:, [0, 6]] == 255).all()


def test_too_many_classes_for_a_palette_are_refused(learnable_store: Path, tmp_path: Path) -> None:
    label = LabelSpec(name="things", kind="classes", classes=tuple(map(str, range(256))))
    with pytest.raises(ConfigError, match="at most 255 classes, label set 'things' has 256"):
        Export(tmp_path / "out", CachedFeatureDataset(learnable_store, "test"), label, {}, "")
    assert not (tmp_path / "out").exists()
