"""Data sets that are pictures with one label file each: what VOC, DUTS and NYU have in common."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.datasets.base import Dataset
from mmdiff_cache.datasets.pictures import read_picture
from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.records import LabelSpec, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One sample: its id, its picture and its label file."""

    sample_id: str
    image: Path
    label: Path


class PairedFiles(Dataset):
    """Splits of pairs, listed when they are first asked for, with one way to read a label file."""

    def __init__(
        self,
        spec: LabelSpec,
        canvas: tuple[int, int],
        splits: Mapping[str, Callable[[], Sequence[Pair]]],
        read_label: Callable[[Path], NDArray[np.generic]],
        source: str,
    ) -> None:
        """`source` says where the files are to be had."""
        self.label_specs, self.canvas = (spec,), canvas
        self._splits, self._read_label, self._source = splits, read_label, source
        self._pairs = cache(self._list)

    def sample_ids(self, split: str) -> Sequence[str]:
        return [pair.sample_id for pair in self._pairs(split)]

    def load(self, split: str, index: int) -> Sample:
        pair = self._pairs(split)[index]
        return Sample(
            sample_id=pair.sample_id,
            image=read_picture(pair.image, upright=False),  # as its mask was drawn: file by file
            labels={self.label_specs[0].name: self._read_label(pair.label)},
        )

    def _list(self, split: str) -> tuple[Pair, ...]:
        if split not in self._splits:
            raise ConfigError(f"split {split!r} is not one of {', '.join(self._splits)}")
        pairs = tuple(self._splits[split]())
        check_files((file for pair in pairs for file in (pair.image, pair.label)), self._source)
        return pairs


def check_files(files: Iterable[Path], remedy: str) -> None:
    """Raise DataError naming the first file that is not there, with what to do; folders are listed once."""
    names: dict[Path, set[str]] = {}
    for file in files:
        if file.parent not in names:
            names[file.parent] = set(os.listdir(file.parent)) if file.parent.is_dir() else set()
        if file.name not in names[file.parent]:
            raise DataError(f"{file} is missing; {remedy}")


def first_folder(root: str | None, name: str, below: Sequence[str], holds: str, source: str) -> Path:
    """The first of the folders `root / below[i]` that holds something of this name.

    Raises ConfigError without a root, DataError (with where to get it) when none does.
    """
    if root is None:
        raise ConfigError(f"data set {name!r} needs the folder of its files: --data-root DIR; {source}")
    base = Path(root).expanduser()
    found = next((base / part for part in below if (base / part / holds).exists()), None)
    if found is None:
        places = " or ".join(str(base / part / holds) for part in below[:2])
        raise DataError(f"{base} is not {name}: there is no {places}; {source}")
    return found


def load_mat(file: Path, source: str) -> dict[str, Any]:
    """The variables of a MATLAB file up to version 7. Raises DataError (with where to get it)."""
    from scipy.io import loadmat  # half a second that only MATLAB files should pay

    try:
        return loadmat(str(file))
    except Exception as error:  # scipy lets through whatever its parser stumbles over
        raise DataError(f"{file} cannot be read ({error or type(error).__name__}); {source}") from error


def read_lines(file: Path, source: str) -> list[str]:
    """The lines of a list that are not empty. Raises DataError (with where to get it) if it is not there."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); {source}") from error
