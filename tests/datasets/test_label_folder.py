"""Label files of one's own: found by id, checked before they are decoded, never guessed at."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.datasets.label_folder import LabelFolder
from mmdiff_cache.errors import DataError
from mmdiff_cache.records import LabelSpec

CLASSES = LabelSpec(name="parts", kind="classes", classes=("a", "b"), ignore=255)
MASK = LabelSpec(name="mask", kind="mask")
DEPTH = LabelSpec(name="far", kind="depth", valid_range=(0.1, 10.0))


def folder(root: Path, spec: LabelSpec = CLASSES, scale: float = 1.0) -> LabelFolder:
    return LabelFolder(root=root, spec=spec, scale=scale)


def test_a_file_is_found_by_split_and_id_with_or_without_its_suffix(tmp_path: Path) -> None:
    for name in ("train/a.png", "b.npy", "sub/c.jpg.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    source = folder(tmp_path)
    assert source.find("train", "a.jpg") == tmp_path / "train/a.png"
    assert source.find("val", "a.jpg") is None
    assert source.find("val", "b") == tmp_path / "b.npy"
    assert source.find("val", "sub/c.jpg") == tmp_path / "sub/c.jpg.png"
    for name in ("../a", "/etc/passwd", "x/../../a"):
        with pytest.raises(DataError, match="leads out of"):
            source.find("train", name)


def test_ids_come_out_as_they_are(tmp_path: Path) -> None:
    ids = np.array([[0, 1, 255], [1, 0, 0]], np.uint8)
    palette = Image.new("P", (3, 2))
    palette.putdata(ids.ravel().tolist())
    palette.putpalette([7] * 768)
    palette.save(tmp_path / "p.png")
    Image.fromarray(ids).save(tmp_path / "l.png")
    np.save(tmp_path / "n.npy", ids.astype(np.int64))
    for name in ("p.png", "l.png", "n.npy"):
        assert folder(tmp_path).size(tmp_path / name) == (2, 3)
        found = folder(tmp_path).load(tmp_path / name)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, ids)
    np.testing.assert_array_equal(folder(tmp_path, MASK).load(tmp_path / "l.png"), ids > 0)


def test_depth_is_metres(tmp_path: Path) -> None:
    metres = np.array([[0.5, 2.0]])
    np.save(tmp_path / "f.npy", metres.astype(np.float32))
    Image.fromarray((metres * 1000).astype(np.uint16)).save(tmp_path / "mm.png")
    for name, scale in (("f.npy", 1.0), ("mm.png", 0.001)):
        found = folder(tmp_path, DEPTH, scale).load(tmp_path / name)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, metres, rtol=1e-6)


def test_what_is_no_label_map_is_refused_by_name(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "rgb.png")
    Image.new("I;16", (3, 2)).save(tmp_path / "deep.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:40])
    (tmp_path / "empty.png").touch()
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "float.npy", np.zeros((2, 2)))
    np.save(tmp_path / "flat.npy", np.zeros(4, np.uint8))
    np.save(tmp_path / "big.npy", np.array([[300]]))
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(DataError, match=file.name):
            folder(tmp_path).load(file)


def test_a_header_cannot_ask_for_more_memory_than_a_picture_may_have(tmp_path: Path) -> None:
    np.save(tmp_path / "huge.npy", np.zeros((1, 1), np.uint8))
    data = (tmp_path / "huge.npy").read_bytes()
    (tmp_path / "huge.npy").write_bytes(data.replace(b"(1, 1)", b"(9999999, 9999999)"[:18].ljust(18)))
    with pytest.raises(DataError, match=r"huge\.npy"):
        folder(tmp_path).load(tmp_path / "huge.npy")
