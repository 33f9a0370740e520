"""A store that gets larger: the manifest and the metadata that it vouches for change as one.

The next manifest is written beside the present one first. From then on the change is decided: whoever opens
the store for writing completes it, and readers take a metadata file for sound when either manifest vouches
for it. Data that is there is not touched; what is new has no record yet.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .files import STAGING, fsync_folders, make_folders, storage_errors, write_durably
from .lock import StoreLock
from .manifest import MANIFEST, NEXT_MANIFEST, Manifest, encode_manifest, read_manifest, with_metadata
from .metadata import split_files
from .schema import LabelArray

logger = logging.getLogger(__name__)


def with_samples_of(stored: Manifest, asked: Manifest) -> Manifest:
    """The stored manifest with the samples and splits that `asked` has behind those that are stored."""
    splits = dict(stored.splits)
    for split, ids in asked.splits.items():
        have = splits.get(split, ())
        if len(ids) > len(have) and ids[: len(have)] == have:
            splits[split] = ids
    if splits == stored.splits:
        return stored
    config = {**asked.config, **({"splits": list(splits)} if "splits" in asked.config else {})}
    return replace(stored, splits=splits, config=config)


def with_label(stored: Manifest, label: LabelArray) -> Manifest:
    """The stored manifest with one more label set."""
    schema = replace(stored.schema, labels=(*stored.schema.labels, replace(label, added=True)))
    return replace(stored, schema=schema)


def begin_growth(root: Path, larger: Manifest) -> Manifest:
    """Turn the store into what `larger` says; the manifest with the hashes of its metadata. OSErrors pass."""
    files = _metadata(larger)
    complete = with_metadata(larger, files)
    write_durably(root, {NEXT_MANIFEST: encode_manifest(complete)})
    _complete(root, files)
    return complete


def finish_growth(root: Path) -> None:
    """Complete a change that was decided and then interrupted. For the holder of the lock alone."""
    if (root / NEXT_MANIFEST).exists():
        _complete(root, _metadata(read_manifest(root, NEXT_MANIFEST)))


def restore_metadata(root: Path) -> None:
    """Write the metadata files that are not what they were; they follow from the manifest alone.

    Raises StoreError when somebody is writing the store, StorageError when it cannot be written.
    """
    with storage_errors(root):
        make_folders(root / STAGING)
        lock = StoreLock(root)
    try:
        with storage_errors(root):
            finish_growth(root)
            files = _metadata(read_manifest(root))
            harmed = {name: data for name, data in files.items() if not _holds(root / name, data)}
            for name in harmed:
                logger.warning("%s is written again", root / name)
            write_durably(root, harmed)
    finally:
        lock.release()


def _metadata(manifest: Manifest) -> dict[str, bytes]:
    return {name: data for split in manifest.splits for name, data in split_files(manifest, split).items()}


def _complete(root: Path, files: Mapping[str, bytes]) -> None:
    write_durably(root, {name: data for name, data in files.items() if not _holds(root / name, data)})
    os.replace(root / NEXT_MANIFEST, root / MANIFEST)
    fsync_folders([root])


def _holds(file: Path, data: bytes) -> bool:
    try:
        return file.read_bytes() == data
    except OSError:
        return False
