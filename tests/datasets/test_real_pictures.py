"""Photographs, a mask and a measured depth map that come with scikit-image: read right to the pixel."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.datasets.images import open_folder
from mmdiff_cache.datasets.pictures import read_picture
from mmdiff_cache.extraction.run import extract

PICTURES = Path(str(files("skimage") / "data"))
FOCAL, BASELINE, OFFSET = 994.978, 0.193001, 31.086
"""Of Middlebury's motorcycle: depth in metres = focal length x baseline / (disparity + offset)."""


@pytest.mark.parametrize("name", ["rocket.jpg", "retina.jpg", "astronaut.png", "camera.png", "logo.png"])
def test_photographs_come_out_as_pillow_decodes_them(name: str) -> None:
    with Image.open(PICTURES / name) as picture:
        seen = np.asarray(picture.convert("RGBA")).astype(np.float64)
    alpha = seen[..., 3:] / 255
    expected = seen[..., :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(read_picture(PICTURES / name), expected, atol=1)


def test_a_stereo_pair_with_measured_depth_goes_through_the_store(
    tmp_path: Path, tiny_flux_folder: Path
) -> None:
    with np.load(PICTURES / "motorcycle_disp.npz") as stored:
        disparity = stored["arr_0"].astype(np.float64)
    depth = np.where(np.isfinite(disparity), FOCAL * BASELINE / (disparity + OFFSET), 0).astype(np.float32)
    np.save(tmp_path / "depth.npy", depth)
    (tmp_path / "left.png").write_bytes((PICTURES / "motorcycle_left.png").read_bytes())
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "left.png", "depth": "depth.npy"}))
    described = {"depth": {"kind": "depth", "valid_range": [0.5, 10]}}
    (tmp_path / "labels.json").write_text(json.dumps(described))
    assert 1.5 < np.median(depth[depth > 0]) < 4, "a motorcycle in a workshop"
    reader = extract(
        ExtractConfig(
            dataset="images",
            data_root=str(tmp_path),
            backbone=str(tiny_flux_folder),
            resolution=32,
            concepts={},
            store=str(tmp_path / "store"),
        )
    )["all"]
    np.testing.assert_array_equal(reader.original_label("depth", 0), depth)
    assert reader.original_label("depth", 0).shape == read_picture(tmp_path / "left.png").shape[:2]
    assert np.isin(reader.labels("depth", [0])[0], depth).all()


def test_a_mask_is_a_label_set(tmp_path: Path) -> None:
    """The horse is black on white there, as many masks are not: its ids are what the file says."""
    with Image.open(PICTURES / "horse.png") as picture:
        mask = (np.asarray(picture.convert("L")) < 128).astype(np.uint8)
    Image.fromarray(mask * 255).save(tmp_path / "mask.png")
    Image.fromarray(np.repeat(255 * (1 - mask[..., None]), 3, axis=2)).save(tmp_path / "horse.png")
    (tmp_path / "metadata.csv").write_text("file_name,horse\nhorse.png,mask.png\n")
    (tmp_path / "labels.json").write_text(json.dumps({"horse": {"kind": "mask"}}))
    np.testing.assert_array_equal(open_folder(str(tmp_path), 64).load("all", 0).labels["horse"], mask)
