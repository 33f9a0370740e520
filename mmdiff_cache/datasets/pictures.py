"""Reading one picture file into RGB, or saying clearly why it cannot be used."""

import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mmdiff_cache.errors import DataError

MAX_PIXELS = 100_000_000
EIGHT_BIT_MODES = frozenset({"1", "L", "P", "RGB", "YCbCr", "CMYK", "LAB", "HSV", "RGBX"})
ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})


def read_picture(path: Path, *, upright: bool = True) -> NDArray[np.uint8]:
    """Decode a file to uint8 [H W 3], upright as its EXIF orientation says, or as its pixels lie.

    Grey, palette and CMYK become RGB; transparent parts are laid over white; an embedded colour profile is
    not applied; 16-bit RGB keeps its high byte. Refused with a DataError that names the file: pictures of
    more than 100 megapixels (checked before decoding), 16-bit grey and floating-point ones (their range is
    not known), animations, and files that are cut off or no pictures at all.
    """
    with opened(path) as picture:
        _check(picture, path)
        return np.asarray(_to_rgb(ImageOps.exif_transpose(picture) if upright else picture))


@contextmanager
def opened(path: Path) -> Generator[Image.Image]:
    """A picture or label map for decoding; whatever goes wrong with it is a DataError that names the file.

    Refuses more than 100 megapixels by the header alone, before any pixel is decoded.
    """
    try:
        with Image.open(path) as picture:
            _check_size(picture, path)
            yield picture
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path}: larger than {MAX_PIXELS // 1_000_000} megapixels; scale it down first"
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not a picture ({_first_bytes(path)}); remove or replace it") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be decoded, perhaps cut off ({error}); replace the file") from error


def _check_size(picture: Image.Image, path: Path) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{path}: {width} x {height} is {width * height / 1e6:.0f} megapixels, "
            f"the limit is {MAX_PIXELS // 1_000_000}; scale it down first"
        )


def _check(picture: Image.Image, path: Path) -> None:
    """Refuse what is no single picture of 8 bits a channel, by the header alone."""
    if (
        getattr(picture, "is_animated", False) and picture.format != "MPO"
    ):  # MPO: a photograph with a preview behind it
        raise DataError(
            f"{path}: an animation of {getattr(picture, 'n_frames', 2)} frames; save the wanted frame alone"
        )
    if picture.mode not in EIGHT_BIT_MODES | ALPHA_MODES:
        raise DataError(
            f"{path}: pixels of type {picture.mode}, not 8 bits a channel; convert it to 8-bit RGB first"
        )


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode not in ALPHA_MODES and "transparency" not in picture.info:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _first_bytes(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    return f"it starts with {start!r}" if start else "it is empty"
