"""Pascal VOC 2012 with the SBD labels: 10,582 training pictures (`trainaug`) and 1,449 for validation.

As distributed: VOCdevkit/VOC2012 with palette PNG masks, and beside it SBD, as benchmark_RELEASE/dataset with
.mat files, or as a folder SegmentationClassAug of PNG masks. Training on SBD's own lists would leak
validation pictures: whatever VOC itself lists for validation is left out.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.datasets.pairs import Pair, PairedFiles, first_folder, load_mat, read_lines
from mmdiff_cache.datasets.pictures import opened
from mmdiff_cache.errors import DataError
from mmdiff_cache.records import LabelSpec

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
LABEL = LabelSpec(name="segmentation", kind="classes", classes=CLASSES, ignore=255)
SIZES = {"train": 10_582, "val": 1_449}
LARGEST_SIDE = 500
"""Pixels; no picture of VOC 2012 is larger."""
VOC_SOURCE = "get VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC/voc2012 and unpack it"
SBD_SOURCE = (
    "get SBD, benchmark.tgz from "
    "www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours, "
    "or a SegmentationClassAug folder made from it"
)
SBD_FOLDERS = ("benchmark_RELEASE/dataset", "SBD/benchmark_RELEASE/dataset", "SBD/dataset", "dataset")


class Voc(PairedFiles):
    """VOC's own masks where it has one, SBD's for the rest of the training pictures."""

    def __init__(self, root: Path, base: Path) -> None:
        super().__init__(
            LABEL,
            (LARGEST_SIDE, LARGEST_SIDE),
            {"train": self._training, "val": self._validation},
            read_mask,
            f"{VOC_SOURCE}; {SBD_SOURCE}",
        )
        self._root, self._base = root, base

    def _validation(self) -> list[Pair]:
        return [self._own(name) for name in self._listed("val")]

    def _training(self) -> list[Pair]:
        train, val = self._listed("train"), self._listed("val")
        known = {*train, *val}
        added = [
            Pair(sample_id=name, image=self._root / "JPEGImages" / f"{name}.jpg", label=label)
            for name, label in self._augmented().items()
            if name not in known
        ]
        return [*(self._own(name) for name in train), *added]

    def _augmented(self) -> dict[str, Path]:
        """The mask file of every picture that SBD has labelled."""
        masks = self._root / "SegmentationClassAug"
        if masks.is_dir():
            return {file.stem: file for file in sorted(masks.glob("*.png"))}
        sbd = first_folder(str(self._base), "SBD", self._sbd_folders(), "cls", SBD_SOURCE)
        lists = [read_lines(sbd / f"{part}.txt", SBD_SOURCE) for part in ("train", "val")]
        return {name: sbd / "cls" / f"{name}.mat" for name in sorted({*lists[0], *lists[1]})}

    def _sbd_folders(self) -> Sequence[str]:
        """Below the folder that was given, or beside VOC2012 and above it."""
        above = [self._root, self._root.parent, self._root.parent.parent]
        return [*SBD_FOLDERS, *(str((folder / part).absolute()) for folder in above for part in SBD_FOLDERS)]

    def _listed(self, split: str) -> list[str]:
        return read_lines(self._root / "ImageSets" / "Segmentation" / f"{split}.txt", VOC_SOURCE)

    def _own(self, name: str) -> Pair:
        return Pair(
            sample_id=name,
            image=self._root / "JPEGImages" / f"{name}.jpg",
            label=self._root / "SegmentationClass" / f"{name}.png",
        )


def open_voc(data_root: str | None, resolution: int) -> Voc:
    """Open VOC 2012 at VOC2012, VOCdevkit or the folder above it.

    Raises ConfigError without a root, DataError naming the first thing that is missing.
    """
    folders = ("", "VOC2012", "VOCdevkit/VOC2012")
    root = first_folder(data_root, "voc", folders, "JPEGImages", VOC_SOURCE)
    return Voc(root, Path(data_root or "").expanduser())


def read_mask(file: Path) -> NDArray[np.generic]:
    """Class ids [H W] uint8, of a palette PNG the indices, of an SBD .mat its GTcls. Raises DataError."""
    return _read_mat(file) if file.suffix == ".mat" else _read_png(file)


def _read_png(file: Path) -> NDArray[np.generic]:
    with opened(file) as picture:
        if picture.mode not in ("P", "L"):
            raise DataError(
                f"{file}: pixels of type {picture.mode}; VOC masks are palette PNG, indices are ids"
            )
        return np.asarray(picture)


def _read_mat(file: Path) -> NDArray[np.generic]:
    content = load_mat(file, "get the file again")
    try:
        values = np.asarray(content["GTcls"]["Segmentation"][0, 0])
    except (KeyError, IndexError, ValueError, TypeError) as error:
        names = ", ".join(name for name in content if not name.startswith("__"))
        raise DataError(f"{file}: has no GTcls with a Segmentation, but {names or 'nothing'}") from error
    if values.ndim != 2 or not np.can_cast(values.dtype, np.uint8):
        raise DataError(
            f"{file}: Segmentation must be uint8 with two axes, got {values.dtype} {values.shape}"
        )
    return values.astype(np.uint8)
