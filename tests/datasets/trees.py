"""Small trees of the real data sets, in the formats in which they are distributed."""

from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat

from mmdiff_cache.datasets.nyu_depth import LABELLED, LIST, SPLITS, TEST_LIST

TRAIN, VAL, ONLY_SBD = ("2007_a", "2007_b"), ("2007_v", "2007_w"), ("2008_s", "2008_t")
FRAMES, ROWS, COLUMNS = 20, 6, 8
SCENES = [f"kitchen_{n // 3:04d}" for n in range(FRAMES)]


def class_ids(name: str) -> np.ndarray:
    """A mask of its own for every picture, with void pixels."""
    values = np.random.default_rng(sum(name.encode())).integers(0, 21, (30, 40)).astype(np.uint8)
    values[:2] = 255
    return values


def save_palette(file: Path, values: np.ndarray) -> None:
    """An indexed PNG whose palette has nothing to do with its indices, as VOC's have not."""
    picture = Image.new("P", values.shape[::-1])
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    picture.putdata(values.ravel().tolist())
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def make_voc(root: Path) -> None:
    """VOCdevkit/VOC2012 and benchmark_RELEASE below one folder; SBD lists a validation picture of VOC."""
    voc, sbd = root / "VOCdevkit" / "VOC2012", root / "benchmark_RELEASE" / "dataset"
    for folder in (voc / "JPEGImages", voc / "ImageSets" / "Segmentation", sbd / "cls"):
        folder.mkdir(parents=True)
    for name in (*TRAIN, *VAL, *ONLY_SBD):
        picture = np.random.default_rng(1).integers(0, 256, (30, 40, 3)).astype(np.uint8)
        Image.fromarray(picture).save(voc / "JPEGImages" / f"{name}.jpg")
        if name not in ONLY_SBD:
            save_palette(voc / "SegmentationClass" / f"{name}.png", class_ids(name))
    for name in (*VAL, *ONLY_SBD, TRAIN[0]):
        segmentation = np.empty((1, 1), [("Segmentation", object), ("CategoriesPresent", object)])
        segmentation["Segmentation"][0, 0] = class_ids(name)
        segmentation["CategoriesPresent"][0, 0] = np.unique(class_ids(name))
        savemat(sbd / "cls" / f"{name}.mat", {"GTcls": segmentation})
    (voc / "ImageSets/Segmentation/train.txt").write_text("\n".join(TRAIN))
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n".join(VAL) + "\n")
    (sbd / "train.txt").write_text(f"{VAL[0]}\n{ONLY_SBD[0]}\n{TRAIN[0]}\n")
    (sbd / "val.txt").write_text(f"{ONLY_SBD[1]}\n{VAL[1]}\n")


def make_duts(root: Path) -> None:
    """Masks with grey levels on both sides of the threshold, in two sizes."""
    for part, names in (("DUTS-TR", ("b", "a")), ("DUTS-TE", ("c", "d"))):
        for kind in ("Image", "Mask"):
            (root / part / f"{part}-{kind}").mkdir(parents=True)
        for number, name in enumerate(names):
            grey = np.zeros((30, 40 + number), np.uint8)
            grey[:, :10], grey[:, 10:20], grey[:, 20:25] = 255, 128, 129
            Image.new("RGB", grey.shape[::-1], "red").save(root / part / f"{part}-Image" / f"{name}.jpg")
            Image.fromarray(grey).save(root / part / f"{part}-Mask" / f"{name}.png")


def millimetres(number: int) -> np.ndarray:
    values = np.random.default_rng(number).integers(500, 9000, (ROWS, COLUMNS)).astype(np.uint16)
    values[0, 0] = 0
    return values


def make_bts(root: Path) -> None:
    """The lists of BTS, scenes under sync/, test frames under official_splits/."""
    lists: dict[str, list[str]] = {LIST: [], TEST_LIST: []}
    for number, (folder, name, listed) in enumerate(
        (
            ("sync", "kitchen_0028b/rgb_00045", LIST),
            ("sync", "study_0001/rgb_00045", LIST),
            ("official_splits/test", "bathroom/rgb_00001", TEST_LIST),
            ("official_splits/test", "bathroom/rgb_00002", TEST_LIST),
        )
    ):
        depth = name.replace("rgb_", "sync_depth_")
        (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (COLUMNS, ROWS)).save(root / folder / f"{name}.jpg")
        Image.fromarray(millimetres(number)).save(root / folder / f"{depth}.png")
        slash = "/" if listed == LIST else ""
        lists[listed].append(f"{slash}{name}.jpg {slash}{depth}.png 518.8579")
    for listed, lines in lists.items():
        (root / listed).write_text("\n".join(lines) + "\n")


def make_labelled(root: Path) -> None:
    """Axes in MATLAB's order, scene names behind references, as version 7.3 has them."""
    random = np.random.default_rng(3)
    with h5py.File(root / LABELLED, "w") as file:
        file["images"] = random.integers(0, 256, (FRAMES, 3, COLUMNS, ROWS)).astype(np.uint8)
        file["depths"] = np.ones((FRAMES, COLUMNS, ROWS), np.float32)
        depth = random.uniform(0.5, 9, (FRAMES, COLUMNS, ROWS)).astype(np.float32)
        depth[:, 0, 0] = 0
        file["rawDepths"] = depth
        references = np.empty((1, FRAMES), h5py.ref_dtype)
        for number, scene in enumerate(SCENES):
            codes = np.frombuffer(scene.encode("utf-16le"), np.uint16)[:, None]
            references[0, number] = file.create_dataset(f"#refs#/{number}", data=codes).ref
        file.create_dataset("scenes", data=references, dtype=h5py.ref_dtype)
    numbers = np.arange(1, FRAMES + 1)[:, None]
    savemat(root / SPLITS, {"trainNdxs": numbers[::2], "testNdxs": numbers[1::2]})


def make_pictures(root: Path) -> None:
    for number in range(2):
        Image.new("RGB", (30, 20), (number, 0, 0)).save(root / f"{number}.png")


TREES: Mapping[str, Callable[[Path], None]] = {
    "voc": make_voc,
    "duts": make_duts,
    "nyu": make_bts,
    "nyu_official": make_labelled,
    "nyu_1449": make_labelled,
    "images": make_pictures,
}
