"""A folder of pictures: which files count, in which order, under which ids."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.datasets.base import safe_id
from mmdiff_cache.datasets.images import open_folder
from mmdiff_cache.errors import ConfigError, DataError


def put(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 2), (number, 0, 0)).save(folder / name)
    return folder


def test_pictures_below_the_folder_are_found_in_the_order_of_their_ids(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "a/2.JPG", "a/10.webp", "a.bmp", "c.TIF", "d.gif", ".hidden.png", ".trash/x.png")
    (tmp_path / "notes.txt").write_text("no picture")
    folder = open_folder(str(tmp_path), 64)
    assert list(folder.sample_ids("all")) == [
        "a.bmp", "a/10.webp", "a/2.JPG", "b.png", "c.TIF", "d.gif",
    ]  # fmt: skip
    assert all(folder.load("all", n).image.shape == (2, 4, 3) for n in range(6))


def test_pictures_of_other_kinds_are_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a.png")
    for name in ("x.HEIC", "b.nef", ".hidden.heic", "notes.txt"):
        (tmp_path / name).touch()
    with caplog.at_level(logging.WARNING):
        assert list(open_folder(str(tmp_path), 64).sample_ids("all")) == ["a.png"]
    assert f"{tmp_path / 'b.nef'} and 1 more left out: pictures are read from .avif, .bmp" in caplog.text


def test_a_sample_is_the_file_of_its_id(tmp_path: Path) -> None:
    folder = open_folder(str(put(tmp_path, "b.png", "a.png")), 64)
    sample = folder.load("all", 1)
    assert sample.sample_id == "b.png"
    np.testing.assert_array_equal(sample.image, np.zeros((2, 4, 3)))
    assert not sample.labels


def test_ids_that_differ_only_in_case_or_accents_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?i)cat\.png.*rename one"):
        open_folder(str(put(tmp_path / "case", "cat.png", "Cat.png")), 64).sample_ids("all")
    with pytest.raises(DataError, match="rename one"):
        open_folder(str(put(tmp_path / "accent", "caf\u00e9.png", "cafe\u0301.png")), 64).sample_ids("all")


@pytest.mark.parametrize(
    "name", ["line\nbreak.png", "esc\x1b[31m.png", "back\\slash.png", "rtl\u202e.png", "\udcff.png"]
)
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="rename the file"):
        safe_id(Path(name))


def test_ordinary_names_are_kept() -> None:
    assert safe_id(Path("Fotos 2026/Zürich (1).jpg")) == "Fotos 2026/Zürich (1).jpg"


def test_linked_folders_are_left_out_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "root", "a.png")
    put(tmp_path / "elsewhere", "b.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "link")
    with caplog.at_level(logging.WARNING):
        assert list(open_folder(str(tmp_path / "root"), 64).sample_ids("all")) == ["a.png"]
    assert "link is a linked folder" in caplog.text


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--data-root"):
        open_folder(None, 64)
    with pytest.raises(DataError, match="file is not a folder"):
        open_folder(str(tmp_path / "file"), 64)
    with pytest.raises(DataError, match="holds no pictures"):
        open_folder(str(tmp_path), 64).sample_ids("all")
    with pytest.raises(ConfigError, match="split 'train'"):
        open_folder(str(put(tmp_path, "a.png")), 64).sample_ids("train")
