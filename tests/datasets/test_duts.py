"""DUTS as it is distributed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.datasets.duts import open_duts
from mmdiff_cache.errors import ConfigError, DataError
from tests.datasets.trees import make_duts


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_duts(tmp_path)
    return tmp_path


def test_masks_are_salient_above_the_fields_threshold(root: Path) -> None:
    data = open_duts(str(root), 512)
    assert (data.sample_ids("train"), data.sample_ids("test")) == (["a", "b"], ["c", "d"])
    assert data.canvas == (30, 41)
    mask = data.load("train", 0).labels["saliency"]
    assert mask.dtype == np.uint8
    assert mask.shape == (30, 41)
    assert [int(mask[0, column]) for column in (0, 9, 10, 19, 20, 24, 25)] == [1, 1, 0, 0, 1, 1, 0]


def test_a_picture_lies_as_its_mask_does(root: Path) -> None:
    """An orientation flag would turn the picture alone: the mask was drawn over the pixels as they lie."""
    file = root / "DUTS-TR" / "DUTS-TR-Image" / "a.jpg"
    with Image.open(file) as picture:
        plain, exif = np.asarray(picture.convert("RGB")), Image.Exif()
        exif[0x0112] = 3  # upside down
        picture.save(file, exif=exif, quality="keep")
    np.testing.assert_array_equal(open_duts(str(root), 512).load("train", 0).image, plain)


def test_what_is_missing_is_named(root: Path, tmp_path: Path) -> None:
    mask = root / "DUTS-TR" / "DUTS-TR-Mask" / "b.png"
    mask.unlink()
    with pytest.raises(DataError, match=f"{mask} is missing; get DUTS-TR"):
        open_duts(str(root), 512).sample_ids("train")
    with pytest.raises(ConfigError, match=r"DUTS-TR\.zip"):
        open_duts(None, 512)
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="is not duts"):
        open_duts(str(tmp_path / "x"), 512)
    (root / "DUTS-TE" / "DUTS-TE-Mask" / "c.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"c\.png: not a picture"):
        open_duts(str(root), 512).load("test", 0)
