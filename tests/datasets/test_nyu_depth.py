"""NYU Depth v2: the list of BTS, the labelled frames of the .mat file, three splits that never mix."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mmdiff_cache.datasets.nyu_depth import (
    LABELLED,
    LIST,
    SPLITS,
    open_bts,
    open_by_scene,
    open_official,
    read_depth,
)
from mmdiff_cache.errors import DataError
from mmdiff_cache.metrics import DepthMetric
from tests.datasets.trees import COLUMNS, FRAMES, ROWS, SCENES, make_bts, make_labelled, millimetres


@pytest.fixture
def bts(tmp_path: Path) -> Path:
    make_bts(tmp_path)
    return tmp_path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    make_labelled(tmp_path)
    return tmp_path


def test_the_list_of_bts_gives_metres(bts: Path) -> None:
    data = open_bts(str(bts), 512)
    assert data.sample_ids("train") == ["kitchen_0028b/rgb_00045", "study_0001/rgb_00045"]
    assert data.sample_ids("test") == ["bathroom/rgb_00001", "bathroom/rgb_00002"]
    depth = data.load("train", 1).labels["depth"]
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, millimetres(1) / 1000, rtol=1e-6)
    assert depth[0, 0] == 0
    np.testing.assert_allclose(data.load("test", 0).labels["depth"], millimetres(2) / 1000, rtol=1e-6)


def test_lists_that_cannot_be_used_are_named(bts: Path) -> None:
    (bts / "sync/study_0001/sync_depth_00045.png").unlink()
    with pytest.raises(DataError, match=r"study_0001/sync_depth_00045\.png is missing; get sync\.zip"):
        open_bts(str(bts), 512).sample_ids("train")
    for line in ("only-one-word", "../../etc/passwd x 1"):
        (bts / LIST).write_text(f"{line}\n")
        with pytest.raises(DataError, match="line 1: expected"):
            open_bts(str(bts), 512).sample_ids("train")
    Image.new("L", (4, 4)).save(bts / "grey.png")
    with pytest.raises(DataError, match="not 16-bit millimetres"):
        read_depth(bts / "grey.png")


def test_the_labelled_frames_stand_upright(labelled: Path) -> None:
    data = open_official(str(labelled), 512)
    assert data.sample_ids("train")[:2] == ["nyu-00000", "nyu-00002"], "MATLAB counts from 1"
    assert data.sample_ids("test")[0] == "nyu-00001"
    sample = data.load("test", 0)
    with h5py.File(labelled / LABELLED) as file:
        np.testing.assert_array_equal(sample.image, file["images"][1].transpose(2, 1, 0))
        np.testing.assert_array_equal(sample.labels["depth"], file["rawDepths"][1].T)
    assert sample.image.shape == (ROWS, COLUMNS, 3)


@pytest.mark.parametrize("train", [[[0]], [[25]], [[1], [1]], [[2]]])
def test_an_official_split_of_other_frames_is_refused(train: list[list[int]], labelled: Path) -> None:
    """MATLAB counts from 1; no frame may be in both halves, or twice in one, or missing."""
    savemat(labelled / SPLITS, {"trainNdxs": np.array(train), "testNdxs": np.arange(2, FRAMES + 1)[:, None]})
    with pytest.raises(DataError, match=r"splits\.mat must list each of the 20 frames once; get"):
        open_official(str(labelled), 512).sample_ids("train")


@pytest.mark.parametrize("lacking", ["images", "rawDepths", "scenes"])
def test_a_variable_that_the_file_lacks_is_named(lacking: str, labelled: Path) -> None:
    with h5py.File(labelled / LABELLED, "a") as file:
        del file[lacking]
    with pytest.raises(DataError, match=rf"{LABELLED} has no {lacking}; get"):
        open_by_scene(str(labelled), 512).load("train", 0)


def test_our_cut_never_has_a_scene_in_both_halves(labelled: Path) -> None:
    data = open_by_scene(str(labelled), 512)
    train, test = ([int(name[-5:]) for name in data.sample_ids(split)] for split in ("train", "test"))
    assert sorted(train + test) == list(range(FRAMES))
    assert not {SCENES[n] for n in train} & {SCENES[n] for n in test}
    assert abs(len(test) - FRAMES * 290 / 1449) <= 2
    assert open_by_scene(str(labelled), 512).sample_ids("test") == data.sample_ids("test")


def test_files_that_are_none_are_named_with_their_source(labelled: Path, tmp_path: Path) -> None:
    (labelled / SPLITS).write_bytes(b"junk")
    with pytest.raises(DataError, match=r"splits\.mat cannot be read .*cs\.nyu\.edu"):
        open_official(str(labelled), 512).sample_ids("train")
    (labelled / LABELLED).write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot be read"):
        open_by_scene(str(labelled), 512).sample_ids("train")
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match=r"is not nyu: there is no .*BTS"):
        open_bts(str(tmp_path / "x"), 512)


def test_only_the_crop_is_scored() -> None:
    truth, guess = np.full((480, 640), 2.0, np.float32), np.full((480, 640), 9.0, np.float32)
    guess[45:471, 41:601] = 2.0
    metric = DepthMetric((1e-3, 10.0), (45, 471, 41, 601))
    assert metric.update(guess, truth)["abs_rel"] == 0
    assert DepthMetric((1e-3, 10.0)).update(guess, truth)["abs_rel"] > 0
