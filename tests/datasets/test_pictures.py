"""Reading picture files: every kind that is understood, and every kind that is refused by name."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.datasets.duts import read_mask as read_saliency
from mmdiff_cache.datasets.nyu_depth import read_depth
from mmdiff_cache.datasets.pictures import read_picture
from mmdiff_cache.datasets.voc import read_mask
from mmdiff_cache.errors import DataError

GRADIENT = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)


def png(width: int, height: int, *, bits: int = 8, rows: bytes = b"") -> bytes:
    """An RGB PNG of a size; without rows it only announces it."""

    def block(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + block(b"IHDR", header)
        + block(b"IDAT", zlib.compress(rows))
        + block(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_lossless_formats_give_the_pixels_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(GRADIENT).save(path, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_picture(path), GRADIENT)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_and_palette_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.png"
    picture = Image.fromarray(GRADIENT).convert(mode)
    picture.save(path)
    np.testing.assert_array_equal(read_picture(path), np.asarray(picture.convert("RGB")))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, quality=100)
    red = read_picture(path)[4, 4].astype(int)
    assert red[0] > 240
    assert red[1] < 15
    assert red[2] < 15


def test_transparent_parts_lie_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0] = (10, 20, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    pixels = read_picture(tmp_path / "alpha.png")
    assert pixels.shape == (2, 3, 3)
    assert (pixels[0] == (10, 20, 30)).all()
    assert (pixels[1] == 255).all()
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None).convert("P")
    palette.putpalette([0, 0, 0, 50, 60, 70] + [0] * 762)
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palette.png", transparency=0)
    assert (read_picture(tmp_path / "palette.png")[0, 0] == 255).all()


def test_sixteen_bits_a_channel_keep_the_high_byte(tmp_path: Path) -> None:
    deep = np.arange(2 * 4 * 3, dtype=np.uint16).reshape(2, 4, 3) * 2731
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    (tmp_path / "deep.png").write_bytes(png(4, 2, bits=16, rows=rows))
    np.testing.assert_array_equal(read_picture(tmp_path / "deep.png"), deep >> 8)


def test_exif_orientation_turns_the_picture_upright(tmp_path: Path) -> None:
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    upright = read_picture(tmp_path / "turned.png")
    assert upright.shape == (16, 8, 3)
    assert (upright[:8] == 255).all()
    assert (upright[8:] == 0).all()


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(30_000, 20_000))
    with pytest.raises(DataError, match=r"bomb\.png.*100"):
        read_picture(path)


@pytest.mark.parametrize("read", [read_mask, read_saliency, read_depth], ids=["voc", "duts", "nyu"])
def test_label_files_are_refused_in_the_same_words(
    read: Callable[[Path], np.ndarray], tmp_path: Path
) -> None:
    """One broken file of ten thousand must not end a run; and what is said of it is said once."""
    (tmp_path / "bomb.png").write_bytes(png(30_000, 20_000))
    (tmp_path / "page.png").write_text("<!DOCTYPE html>")
    rng = np.random.default_rng(0)
    right, other = (np.uint16, np.uint8) if read is read_depth else (np.uint8, np.uint16)
    Image.fromarray(rng.integers(0, 9, (32, 32), dtype=right)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-40])
    Image.fromarray(rng.integers(0, 9, (32, 32), dtype=other)).save(tmp_path / "kind.png")
    for name, reason in [
        ("bomb.png", "megapixels"),
        ("page.png", "not a picture"),
        ("cut.png", "perhaps cut off"),
        ("kind.png", "pixels of type"),
    ]:
        with pytest.raises(DataError, match=f"{name}: .*{reason}") as caught:
            read(tmp_path / name)
        assert str(caught.value).count(str(tmp_path)) == 1


def test_a_cut_off_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "webp", "bmp"):
        whole = tmp_path / f"whole.{suffix}"
        noise.save(whole)
        content = whole.read_bytes()
        for share in (0.0, 0.02, 0.3, 0.7, 0.95):
            cut = tmp_path / f"cut.{suffix}"
            cut.write_bytes(content[: int(len(content) * share)])
            with pytest.raises(DataError, match=rf"cut\.{suffix}"):
                read_picture(cut)


def test_what_is_no_eight_bit_picture_is_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "page.png").write_text("<!DOCTYPE html>")
    (tmp_path / "empty.png").touch()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    for name, reason in [
        ("deep.png", "8 bits"),
        ("page.png", "not a picture"),
        ("empty.png", "it is empty"),
        ("moving.png", "animation of 2 frames"),
        ("absent.png", "cannot be decoded"),
    ]:
        with pytest.raises(DataError, match=f"{name}.*{reason}"):
            read_picture(tmp_path / name)
