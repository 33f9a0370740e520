"""What every data set offers: the order of its samples, and one sample at a time."""

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import PurePath

from mmdiff_cache.errors import DataError
from mmdiff_cache.records import LabelSpec, Sample


class Dataset(ABC):
    """A collection of pictures in a fixed order, some of them with labels.

    The order of `sample_ids` is part of a store's layout, so it depends on the names alone, never on the
    order in which a file system lists them.
    """

    label_specs: tuple[LabelSpec, ...] = ()
    canvas: tuple[int, int] = (0, 0)
    """Rows and columns in which every label map fits, as distributed; a data set with labels must say it."""

    @abstractmethod
    def sample_ids(self, split: str) -> Sequence[str]:
        """The ids of a split in order, unique within it; reads no picture.

        Raises ConfigError for an unknown split, DataError for a tree that cannot be used.
        """

    def sample_without_prompt(self, kind: str) -> str | None:
        """The first sample without a prompt of an announced kind; None where all have one."""
        return None

    @abstractmethod
    def load(self, split: str, index: int) -> Sample:
        """Read one sample. Raises DataError naming the file when the picture or a label cannot be used."""


def safe_id(relative: PurePath) -> str:
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
