"""A folder of label maps, one file a sample, named by the sample's id: labels of one's own for any store."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.datasets.pictures import MAX_PIXELS, opened
from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.records import LabelKind, LabelSpec

SUFFIXES = (".png", ".npy")
ID_MODES = frozenset({"1", "L", "P"})
DEPTH_MODES = frozenset({"I;16", "I;16B", "I", "F", "L"})


def label_spec(
    name: str,
    kind: str,
    classes: Sequence[str] | None,
    ignore: int | None,
    valid_range: Sequence[float] | None,
) -> LabelSpec:
    """A LabelSpec from what a person typed. Raises ConfigError for a kind or field that cannot be."""
    known = next((one for one in get_args(LabelKind) if one == kind), None)
    if known is None:
        raise ConfigError(f"labels are of kind {', '.join(get_args(LabelKind))}, got {kind!r}")
    if (known == "classes") != bool(classes):
        raise ConfigError(f"labels of kind {kind} {'need' if known == 'classes' else 'have no'} classes")
    if (known == "depth") != (valid_range is not None):
        raise ConfigError(
            f"labels of kind {kind} {'need' if known == 'depth' else 'have no'} valid range of metres"
        )
    if valid_range is not None and not (len(valid_range) == 2 and 0 <= valid_range[0] < valid_range[1]):
        raise ConfigError(f"a valid range is two numbers, the lower first, got {list(valid_range)}")
    if ignore is not None and (known == "depth" or not 0 <= ignore <= 255):
        raise ConfigError(f"ignore is an id from 0 to 255 of class or mask labels, got {ignore}")
    return LabelSpec(
        name=name,
        kind=known,
        classes=tuple(classes or ()),
        ignore=ignore,
        valid_range=None if valid_range is None else (valid_range[0], valid_range[1]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFolder:
    """Files DIR/<split>/<id>.png or DIR/<id>.png (or .npy), with or without the suffix that an id may have.

    Ids and masks are 8-bit PNG (of a palette the indices) or integer arrays; in a mask, 255 is taken for 1
    where no id is to be ignored. Depth is an array or a 16-bit PNG, in metres once multiplied by `scale`.
    """

    root: Path
    spec: LabelSpec
    scale: float = 1.0
    """Metres a unit of a depth file: 0.001 for millimetres."""

    def find(self, split: str, sample_id: str) -> Path | None:
        """The file of a sample, None where it has none. Raises DataError for an id that leads elsewhere."""
        parts = PurePosixPath(sample_id)
        if parts.is_absolute() or ".." in parts.parts:
            raise DataError(f"sample id {sample_id!r} leads out of {self.root}")
        stems = dict.fromkeys((sample_id, str(parts.with_suffix(""))))
        folders = [self.root / split, self.root]
        tried = (folder / f"{stem}{end}" for folder in folders for stem in stems for end in SUFFIXES)
        return next((file for file in tried if file.is_file()), None)

    def size(self, file: Path) -> tuple[int, int]:
        """Rows and columns of a label map, read off its header. Raises DataError for what is no label map."""
        if file.suffix == ".npy":
            with _readable(file):
                shape = np.load(file, mmap_mode="r", allow_pickle=False).shape
        else:
            with opened(file) as picture:
                shape = (picture.height, picture.width)
        if len(shape) != 2 or not 0 < shape[0] * shape[1] <= MAX_PIXELS:
            raise DataError(
                f"{file}: a label map has two axes and at most {MAX_PIXELS:,} pixels, got {shape}"
            )
        return shape[0], shape[1]

    def load(self, file: Path) -> NDArray[Any]:
        """A label map as it is stored: uint8 ids or float32 metres. Raises DataError if it does not fit."""
        self.size(file)
        values = _load_array(file) if file.suffix == ".npy" else self._decode(file)
        if self.spec.kind == "depth":
            return self._metres(file, values)
        if values.dtype.kind not in "uib" or values.min() < 0 or values.max() > 255:
            raise DataError(f"{file}: ids must be whole numbers from 0 to 255, got {values.dtype}")
        ids = values.astype(np.uint8)
        if self.spec.kind == "mask" and self.spec.ignore is None:
            ids = np.where(ids == 255, np.uint8(1), ids)
        return ids

    def _decode(self, file: Path) -> NDArray[Any]:
        wanted = DEPTH_MODES if self.spec.kind == "depth" else ID_MODES
        with opened(file) as picture:
            if picture.mode not in wanted:
                raise DataError(
                    f"{file}: pixels of type {picture.mode}; labels of kind {self.spec.kind} need one of "
                    f"{', '.join(sorted(wanted))}"
                )
            return np.asarray(picture)

    def _metres(self, file: Path, values: NDArray[Any]) -> NDArray[np.float32]:
        if values.dtype.kind not in "fui":
            raise DataError(f"{file}: depths must be numbers, got {values.dtype}")
        return (values.astype(np.float64) * self.scale).astype(np.float32)


def _load_array(file: Path) -> NDArray[Any]:
    with _readable(file):
        return np.load(file, allow_pickle=False)


@contextmanager
def _readable(file: Path) -> Generator[None]:
    """Turn what numpy raises about an array file into a DataError with the file's name."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"{file}: cannot be read as a label map ({error})") from error
