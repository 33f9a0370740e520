"""NYU Depth v2 in the three ways in which it is used, depth in metres and 0 where nothing was measured.

`nyu`: the 24,231 frames of the list that came with BTS, tested on the official 654. `nyu_official`: the 795
and 654 labelled frames. `nyu_1449`: the 1,449 labelled frames cut 1,159 / 290, as the paper's comparison of
concepts does; its list is unpublished, so this one is ours: by scene, so that no room is in both halves.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.datasets.base import Dataset
from mmdiff_cache.datasets.pairs import Pair, PairedFiles, first_folder, load_mat, read_lines
from mmdiff_cache.datasets.pictures import opened
from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.records import LabelSpec, Sample

CANVAS = (480, 640)
LABEL = LabelSpec(name="depth", kind="depth", valid_range=(1e-3, 10.0), crop=(45, 471, 41, 601))
"""Range and crop of Eigen's protocol, as BTS and its successors evaluate."""
BTS_SIZES = {"train": 24_231, "test": 654}
OFFICIAL_SIZES = {"train": 795, "test": 654}
OUR_SIZES = {"train": 1_159, "test": 290}
LIST = "nyudepthv2_train_files_with_gt.txt"
TEST_LIST = "nyudepthv2_test_files_with_gt.txt"
LABELLED, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
BTS_SOURCE = (
    f"get sync.zip, {LIST} and {TEST_LIST} as the BTS repository (github.com/cleinc/bts) describes, and put "
    "the lists beside the folder sync (or the scenes themselves)"
)
MAT_SOURCE = f"get {LABELLED} and {SPLITS} from cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html"


def open_bts(data_root: str | None, resolution: int) -> PairedFiles:
    """Open the folder with BTS's lists. Raises ConfigError without a root, DataError if it lacks them."""
    root = first_folder(data_root, "nyu", ("", "nyu_depth_v2"), LIST, BTS_SOURCE)
    splits = {"train": partial(_listed, root, LIST), "test": partial(_listed, root, TEST_LIST)}
    return PairedFiles(LABEL, CANVAS, splits, read_depth, BTS_SOURCE)


def _listed(root: Path, name: str) -> list[Pair]:
    """A list has `picture depth focal` a line; files lie below root, sync/ or official_splits/test/."""
    pairs: list[Pair] = []
    folders = [root, root / "sync", root / "official_splits" / "test"]
    for number, line in enumerate(read_lines(root / name, BTS_SOURCE), 1):
        words = line.split()
        if len(words) < 2 or ".." in line:
            raise DataError(
                f"{root / name}, line {number}: expected 'picture depth focal', got {line[:80]!r}"
            )
        image, depth = (word.lstrip("/") for word in words[:2])
        folder = next((folder for folder in folders if (folder / image).parent.is_dir()), root)
        sample_id = str(Path(image).with_suffix(""))
        pairs.append(Pair(sample_id=sample_id, image=folder / image, label=folder / depth))
    return pairs


def read_depth(file: Path) -> NDArray[np.generic]:
    """Metres [H W] float32 from a 16-bit PNG in millimetres. Raises DataError for another type of picture."""
    with opened(file) as picture:
        if picture.mode not in ("I;16", "I"):
            raise DataError(f"{file}: pixels of type {picture.mode}, not 16-bit millimetres")
        return (np.asarray(picture, np.float64) / 1000).astype(np.float32)


class LabelledNyu(Dataset):
    """The 1,449 labelled frames of the .mat file (version 7.3, which is HDF5). Depth is `rawDepths`."""

    label_specs, canvas = (LABEL,), CANVAS

    def __init__(self, file: Path, splits: Mapping[str, Callable[["LabelledNyu"], Sequence[int]]]) -> None:
        self._path, self._splits = file, splits

    def sample_ids(self, split: str) -> Sequence[str]:
        return [f"nyu-{frame:05d}" for frame in self._frames(split)]

    def load(self, split: str, index: int) -> Sample:
        frame = self._frames(split)[index]
        images, depths = self._variable("images"), self._variable("rawDepths")
        try:
            image, depth = images[frame], depths[frame]
        except (OSError, KeyError, ValueError) as error:
            raise DataError(
                f"{self._path}: frame {frame} cannot be read ({error}); get the file again"
            ) from error
        return Sample(
            sample_id=f"nyu-{frame:05d}",
            image=np.ascontiguousarray(
                image.transpose(2, 1, 0)
            ),  # MATLAB's order of axes is the other way round
            labels={"depth": np.ascontiguousarray(depth.T, np.float32)},
        )

    @cached_property
    def _file(self) -> Any:
        import h5py  # only this data set needs it

        try:
            return h5py.File(self._path, "r")
        except OSError as error:
            raise DataError(f"{self._path} cannot be read ({error}); {MAT_SOURCE}") from error

    def _variable(self, name: str) -> Any:
        if name not in self._file:
            raise DataError(f"{self._path} has no {name}; {MAT_SOURCE}")
        return self._file[name]

    def _frames(self, split: str) -> Sequence[int]:
        if split not in self._splits:
            raise ConfigError(f"split {split!r} is not one of {', '.join(self._splits)}")
        return self._splits[split](self)

    @cached_property
    def scenes(self) -> list[str]:
        """The scene of every frame, such as `kitchen_0004`."""
        names = self._variable("scenes")
        return [
            "".join(map(chr, np.asarray(self._file[reference]).ravel())) for reference in names[:].ravel()
        ]

    @cached_property
    def official(self) -> Mapping[str, list[int]]:
        """The frames of the official split, counted from 0, every frame in one half."""
        file = self._path.with_name(SPLITS)
        content, keys = load_mat(file, MAT_SOURCE), {"train": "trainNdxs", "test": "testNdxs"}
        try:
            frames = {split: sorted(int(n) - 1 for n in content[key].ravel()) for split, key in keys.items()}
        except (KeyError, ValueError) as error:
            raise DataError(f"{file} has no {error}; {MAT_SOURCE}") from error
        count = len(self._variable("images"))
        if sorted([*frames["train"], *frames["test"]]) != list(range(count)):
            raise DataError(f"{file} must list each of the {count:,} frames once; {MAT_SOURCE}")
        return frames

    @cached_property
    def by_scene(self) -> Mapping[str, list[int]]:
        """Our cut: scenes in the order of a hash of their names fill the test half as far as they fit."""
        members: dict[str, list[int]] = {}
        for frame, scene in enumerate(self.scenes):
            members.setdefault(scene, []).append(frame)
        wanted = round(len(self.scenes) * OUR_SIZES["test"] / sum(OUR_SIZES.values()))
        test: list[int] = []
        for scene in sorted(members, key=lambda name: hashlib.sha256(name.encode()).digest()):
            if len(test) + len(members[scene]) <= wanted:
                test += members[scene]
        return {"train": sorted(set(range(len(self.scenes))) - set(test)), "test": sorted(test)}


def open_official(data_root: str | None, resolution: int) -> LabelledNyu:
    """The labelled frames in the official split. Raises ConfigError or DataError as open_bts does."""
    return LabelledNyu(
        _labelled(data_root, "nyu_official"),
        {"train": lambda nyu: nyu.official["train"], "test": lambda nyu: nyu.official["test"]},
    )


def open_by_scene(data_root: str | None, resolution: int) -> LabelledNyu:
    """The labelled frames cut by scene. Raises ConfigError or DataError as open_bts does."""
    return LabelledNyu(
        _labelled(data_root, "nyu_1449"),
        {"train": lambda nyu: nyu.by_scene["train"], "test": lambda nyu: nyu.by_scene["test"]},
    )


def _labelled(data_root: str | None, name: str) -> Path:
    return first_folder(data_root, name, ("", "nyu_depth_v2"), LABELLED, MAT_SOURCE) / LABELLED
