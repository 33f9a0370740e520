"""Any folder of pictures: no labels, one split named `all`."""

import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from mmdiff_cache.datasets.base import Dataset
from mmdiff_cache.datasets.pictures import read_picture
from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.records import Sample

SPLIT = "all"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})

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
        if split != SPLIT:
            raise ConfigError(
                f"split {split!r} is not one of a folder of pictures; it has one split, {SPLIT!r}"
            )
        return self._ids

    def load(self, split: str, index: int) -> Sample:
        sample_id = self.sample_ids(split)[index]
        return Sample(sample_id=sample_id, image=read_picture(self._files[sample_id]))

    @cached_property
    def _files(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        folded: dict[str, str] = {}
        for path in _walk(self.root):
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


def open_folder(data_root: str | None, resolution: int) -> ImageFolder:
    """Open a folder of pictures, of any size.

    Raises ConfigError without a root, DataError for a root that is not a folder.
    """
    if data_root is None:
        raise ConfigError("data set 'images' needs the folder of its pictures: --data-root DIR")
    root = Path(data_root).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; --data-root must name a folder of pictures")
    return ImageFolder(root)


def safe_id(relative: Path) -> str:
    """The id of a file: its path below the root in Unicode NFC.

    Raises DataError for a name with characters that no store, page or terminal should carry.
    """
    sample_id = unicodedata.normalize("NFC", relative.as_posix())
    bad = unsafe_character(sample_id)
    if bad is not None:
        raise DataError(
            f"file name {sample_id!r} holds the character {bad!r}, which is not safe in an id; "
            "rename the file"
        )
    return sample_id


def unsafe_character(sample_id: str) -> str | None:
    """The first character that must not be in an id: control, format and line characters, and backslashes."""
    unsafe = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return next((c for c in sample_id if c == "\\" or unicodedata.category(c) in unsafe), None)


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
            if not name.startswith(".") and path.suffix.lower() in SUFFIXES:
                yield path
