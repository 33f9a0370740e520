"""Another label set for a store that is there, from a folder; features and other labels stay untouched."""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.datasets.label_folder import LabelFolder
from mmdiff_cache.datasets.transforms import fit_label
from mmdiff_cache.errors import DataError
from mmdiff_cache.records import Progress
from mmdiff_cache.store.checks import stray_id
from mmdiff_cache.store.label_writer import LabelPartition, open_label_writer
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.schema import LabelArray

logger = logging.getLogger(__name__)

NO_FILE = "no label file"


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedLabels:
    """What came of it, over all splits."""

    name: str
    labelled: int
    without_file: int
    """Samples for which the folder has nothing: training on these labels leaves them out."""
    unusable: tuple[str, ...]
    """Files that could not be used, with the reason."""

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.labelled:,} samples labelled, {self.without_file:,} without a file"]
        return "\n".join([*lines, *self.unusable])


def add_labels(
    path: str | os.PathLike[str], source: LabelFolder, progress: Progress | None = None
) -> AddedLabels:
    """Write the labels of a folder into a store as one more label set. Safe to run again, and to interrupt.

    Partitions that have them are skipped. Raises DataError when the folder has no label for any sample,
    ConfigError for a name that is taken, StoreError for a folder that is no store.
    """
    store = open_store(path)
    files = {split: [source.find(split, name) for name in store[split].ids] for split in store.splits}
    found = [file for of_split in files.values() for file in of_split if file is not None]
    if not found:
        first = store[store.splits[0]].ids[0]
        raise DataError(
            f"{source.root} has no label for any sample of {store.path}; that of {first!r} would be "
            f"{source.root / f'{first}.png'}"
        )
    label = LabelArray(spec=source.spec, canvas=_canvas(source, found), added=True)
    total, done = sum(map(len, files.values())), 0
    with open_label_writer(store.path, label) as writer:
        for split, of_split in files.items():
            pending = writer.pending(split)
            done += len(of_split) - sum(partition.size for partition in pending)
            for partition in pending:
                with writer.begin(partition) as out:
                    for offset, file in enumerate(of_split[partition.start : partition.stop]):
                        _write(out, offset, source, file)
                        done += 1
                        if progress is not None:
                            progress(done, total, split)
                    out.commit()
    return _result(store.path, source.spec.name)


def _canvas(source: LabelFolder, files: list[Path]) -> tuple[int, int]:
    """Rows and columns in which every label fits; a file that cannot be read does not count."""
    sizes: list[tuple[int, int]] = []
    for file in files:
        try:
            sizes.append(source.size(file))
        except DataError as error:
            logger.warning("%s", error)
    if not sizes:
        raise DataError(f"none of the {len(files)} label files in {source.root} can be read")
    return max(rows for rows, _ in sizes), max(columns for _, columns in sizes)


def _write(out: LabelPartition, offset: int, source: LabelFolder, file: Path | None) -> None:
    if file is None:
        out.fail(offset, NO_FILE)
        return
    try:
        values = source.load(file)
        stray = stray_id(values, source.spec)
        if stray is not None:
            raise DataError(f"{file}: has the value {stray}, which is no class and not ignored")
    except DataError as error:
        out.fail(offset, str(error))
        return
    small = fit_label(values, source.spec, out.manifest.schema.image_size[0], out.manifest.fit)
    out.write(offset, small, values, _hash(values))


def _hash(values: NDArray[Any]) -> str:
    head = f"{values.dtype.str}\0{values.shape}\0".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()


def _result(path: Path, name: str) -> AddedLabels:
    """Count what the records say."""
    store, labelled, without, unusable = open_store(path), 0, 0, []
    for split in store.splits:
        entries = store[split].label_entries(name)
        labelled += sum(entry.state == "done" for entry in entries)
        without += sum(entry.reason == NO_FILE for entry in entries)
        unusable += [
            f"{e.sample_id}: {e.reason}" for e in entries if e.state == "failed" and e.reason != NO_FILE
        ]
    return AddedLabels(name=name, labelled=labelled, without_file=without, unusable=tuple(unusable))
