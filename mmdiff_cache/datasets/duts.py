"""DUTS: 10,553 training and 5,019 test pictures with masks of what stands out."""

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.datasets.pairs import Pair, PairedFiles, first_folder
from mmdiff_cache.datasets.pictures import ALPHA_MODES, EIGHT_BIT_MODES, opened
from mmdiff_cache.errors import DataError
from mmdiff_cache.records import LabelSpec

LABEL = LabelSpec(name="saliency", kind="mask")
SIZES = {"train": 10_553, "test": 5_019}
PARTS = {"train": "DUTS-TR", "test": "DUTS-TE"}
SOURCE = "get DUTS-TR.zip and DUTS-TE.zip from saliencydetection.net/duts and unpack both there"
THRESHOLD = 128
"""Grey levels above it are salient, as the field's metrics have it."""


def open_duts(data_root: str | None, resolution: int) -> PairedFiles:
    """Open the folder that holds DUTS-TR and DUTS-TE.

    Raises ConfigError without a root, DataError naming the first thing that is missing.
    """
    root = first_folder(data_root, "duts", ("", "DUTS"), PARTS["test"], SOURCE)
    splits = {split: partial(_pairs, root / part, part) for split, part in PARTS.items()}
    return PairedFiles(LABEL, _canvas(root), splits, read_mask, SOURCE)


def _pairs(folder: Path, part: str) -> list[Pair]:
    images, masks = folder / f"{part}-Image", folder / f"{part}-Mask"
    if not images.is_dir():
        raise DataError(f"{images} is missing; {SOURCE}")
    return [
        Pair(sample_id=image.stem, image=image, label=masks / f"{image.stem}.png")
        for image in sorted(images.glob("*.jpg"))
    ]


def _canvas(root: Path) -> tuple[int, int]:
    """Rows and columns in which every mask fits, read off the masks' headers."""
    sizes = [_size(mask) for part in PARTS.values() for mask in (root / part / f"{part}-Mask").glob("*.png")]
    if not sizes:
        raise DataError(f"{root} has no masks; {SOURCE}")
    return max(rows for rows, _ in sizes), max(columns for _, columns in sizes)


def _size(mask: Path) -> tuple[int, int]:
    try:
        with opened(mask) as picture:
            return picture.height, picture.width
    except DataError:
        return 1, 1  # the sample itself says what is wrong with it


def read_mask(file: Path) -> NDArray[np.generic]:
    """1 where salient, else 0, [H W] uint8. Raises DataError for what is no 8-bit grey or colour PNG."""
    with opened(file) as picture:
        if picture.mode not in EIGHT_BIT_MODES | ALPHA_MODES:
            raise DataError(f"{file}: pixels of type {picture.mode}; DUTS masks have 8 bits")
        return (np.asarray(picture.convert("L")) > THRESHOLD).astype(np.uint8)
