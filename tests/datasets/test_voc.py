"""VOC 2012 and SBD as they are distributed: palette masks, .mat masks, no validation picture in training."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.datasets.transforms import prepare
from mmdiff_cache.datasets.voc import CLASSES, open_voc, read_mask
from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.extraction.plan import plan
from tests.datasets.trees import ONLY_SBD, TRAIN, VAL, class_ids, make_voc, save_palette


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_voc(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_masks_come_out_to_the_pixel_wherever_the_root_is(root: Path, given: str) -> None:
    data = open_voc(str(root / given), 512)
    assert data.sample_ids("val") == list(VAL)
    assert data.sample_ids("train") == [*TRAIN, *ONLY_SBD], "never a validation picture"
    for split in ("train", "val"):
        for n, name in enumerate(data.sample_ids(split)):
            sample = data.load(split, n)
            np.testing.assert_array_equal(sample.labels["segmentation"], class_ids(name))
            assert sample.image.shape == (30, 40, 3)
    assert len(CLASSES) == 21
    ready = prepare(data.load("val", 0), 16, "", specs=data.label_specs)
    assert set(np.unique(ready.labels["segmentation"])) <= {*range(21), 255}


def test_a_folder_of_converted_masks_serves_as_well_as_sbd(root: Path) -> None:
    shutil.rmtree(root / "benchmark_RELEASE")
    with pytest.raises(DataError, match=r"is not SBD: there is no .*benchmark\.tgz"):
        open_voc(str(root), 512).sample_ids("train")
    assert open_voc(str(root), 512).sample_ids("val") == list(VAL), "validation needs no SBD"
    for name in (*ONLY_SBD, *VAL, *TRAIN):
        save_palette(root / "VOCdevkit/VOC2012/SegmentationClassAug" / f"{name}.png", class_ids(name))
    data = open_voc(str(root), 512)
    assert data.sample_ids("train") == [*TRAIN, *ONLY_SBD]
    np.testing.assert_array_equal(data.load("train", 3).labels["segmentation"], class_ids(ONLY_SBD[1]))


def test_the_first_thing_that_is_missing_is_named_with_its_source(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data-root DIR; get VOCtrainval"):
        open_voc(None, 512)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is not voc: there is no"):
        open_voc(str(tmp_path / "empty"), 512)
    picture = root / "VOCdevkit/VOC2012/JPEGImages" / f"{ONLY_SBD[0]}.jpg"
    picture.unlink()
    with pytest.raises(DataError, match=f"{picture} is missing; get VOCtrainval"):
        open_voc(str(root), 512).sample_ids("train")
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt cannot be read"):
        open_voc(str(root), 512).sample_ids("val")


def test_masks_that_are_none_are_refused_by_name(root: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "colours.png")
    (tmp_path / "empty.mat").touch()
    (tmp_path / "junk.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(300))
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n")
    savemat(tmp_path / "other.mat", {"x": 1})
    for name, ids in (("wide", np.full((2, 2), 300, np.uint16)), ("flat", np.zeros((2, 2, 2), np.uint8))):
        savemat(tmp_path / f"{name}.mat", {"GTcls": {"Segmentation": ids}})
    names = ("colours.png", "empty.mat", "junk.mat", "cut.png", "other.mat", "wide.mat", "flat.mat")
    for name in names:
        with pytest.raises(DataError, match=name):
            read_mask(tmp_path / name)


def test_the_plan_reports_other_counts_than_the_published_ones(root: Path, tmp_path: Path) -> None:
    text = str(plan(ExtractConfig(dataset="voc", data_root=str(root), store=str(tmp_path / "s"))))
    assert "voc: train 4, val 2" in text
    assert "split train has 4 samples here, 10,582 as published" in text
    assert "single.4 single.15 single.26 single.37" in text
