"""Any folder of pictures: no labels, one split named `all`, unless a list says more (listed)."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from mmdiff_cache.datasets.base import Dataset, safe_id
from mmdiff_cache.datasets.listed import (
    DEFAULT_SPLIT,
    LABELS,
    LISTS,
    ListedImages,
    find_list,
    read_rows,
    splits_of,
)
from mmdiff_cache.datasets.pictures import read_picture
from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.records import Sample

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
OTHERS = frozenset(
    {".heic", ".heif", ".jp2", ".j2k", ".jxl", ".ppm", ".pgm", ".tga", ".psd", ".exr", ".hdr", ".svg"}
    | {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"}
)
"""Pictures that are not read, and are named so that nobody takes them for extracted."""

logger = logging.getLogger(__name__)


class ImageFolder(Dataset):
    """Every picture below a folder, in the order of its id: the path below the folder, `/` between parts.

    Hidden files and folders (a leading dot) and linked folders are left out.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def sample_ids(self, split: str) -> Sequence[str]:
        """All ids, sorted.

        Raises DataError for no pictures at all, an unsafe name, or two ids that differ only in case.
        """
        if split != DEFAULT_SPLIT:
            raise ConfigError(
                f"split {split!r} is not one of a folder of pictures; it has one split, {DEFAULT_SPLIT!r}"
            )
        return self._ids

    def sample_without_prompt(self, kind: str) -> str | None:
        return self._ids[0]

    def load(self, split: str, index: int) -> Sample:
        sample_id = self.sample_ids(split)[index]
        return Sample(sample_id=sample_id, image=read_picture(self._files[sample_id]))

    @cached_property
    def _files(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        folded: dict[str, str] = {}
        found = list(_walk(self.root))
        _name_left_out([path for path in found if path.suffix.lower() in OTHERS])
        for path in found:
            if path.suffix.lower() not in SUFFIXES:
                continue
            sample_id = safe_id(path.relative_to(self.root))
            twin = folded.setdefault(sample_id.casefold(), sample_id)
            if sample_id in files or twin != sample_id:
                raise DataError(
                    f"{path}: its id {sample_id!r} equals that of {files[twin]} but for case or accents; "
                    "rename one"
                )
            files[sample_id] = path
        if not files:
            raise DataError(
                f"{self.root} holds no pictures ({', '.join(sorted(SUFFIXES))}); give another --data-root"
            )
        return files

    @cached_property
    def _ids(self) -> tuple[str, ...]:
        return tuple(sorted(self._files))


def open_folder(data_root: str | None, resolution: int) -> Dataset:
    """Open a folder of pictures; one with a list has the pictures, splits, prompts and labels of that.

    Raises ConfigError without a root, DataError for one that is no folder or whose list cannot be used.
    """
    if data_root is None:
        raise ConfigError("data set 'images' needs the folder of its pictures: --data-root DIR")
    root = Path(data_root).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; --data-root must name a folder of pictures")
    file = find_list(root)
    if file is None and (root / LABELS).is_file():
        logger.warning(
            "%s is not used: no %s says which file is a picture's label", root / LABELS, " or ".join(LISTS)
        )
    return ImageFolder(root) if file is None else ListedImages(root, file)


def find_splits(data_root: str | None) -> Mapping[str, int | None]:
    """The splits of a folder: those of its list, else one."""
    file = None if data_root is None else find_list(Path(data_root).expanduser())
    return dict.fromkeys([DEFAULT_SPLIT] if file is None else splits_of(read_rows(file)))


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: cannot be listed ({error.strerror}); check the permissions"
        ) from error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        for linked in [name for name in subfolders if os.path.islink(os.path.join(folder, name))]:
            logger.warning("%s is a linked folder and is left out", os.path.join(folder, linked))
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.suffix.lower() in SUFFIXES | OTHERS:
                yield path


def _name_left_out(files: Sequence[Path]) -> None:
    if files:
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        read = ", ".join(sorted(SUFFIXES))
        logger.warning("%s%s left out: pictures are read from %s; convert it first", min(files), others, read)
