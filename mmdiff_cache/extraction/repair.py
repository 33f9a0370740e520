"""Makes a damaged store whole again, from its own manifest: what verify finds is extracted anew, no more.

Nothing is deleted before its replacement is there: a partition's old record and files stay until the new ones
are durable. The result has the bytes of a store that was never damaged.
"""

import logging
import os
from dataclasses import replace
from pathlib import Path

from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.errors import DamageError, StoreError
from mmdiff_cache.extraction.plan import plan
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.records import Progress
from mmdiff_cache.store.files import make_folders, storage_errors, write_durably
from mmdiff_cache.store.lock import StoreLock
from mmdiff_cache.store.manifest import MANIFEST, Manifest, read_manifest
from mmdiff_cache.store.metadata import split_files
from mmdiff_cache.store.verify import Verification, verify

logger = logging.getLogger(__name__)


def repair(path: str | os.PathLike[str], progress: Progress | None = None) -> Verification:
    """Redo what is damaged or missing in a store with its recorded configuration; what verify says then.

    Raises StoreError where there is no store or its manifest is damaged, DataError when the sources are no
    longer those it was made from, BackboneError when the weights are missing or others.
    """
    root = Path(path).expanduser().absolute()
    found = verify(root, progress=progress)
    if found.sound and not found.pending:
        return found
    try:
        manifest = read_manifest(root)
    except DamageError as error:
        raise StoreError(
            f"{error}; only the manifest says what the store should hold, so it cannot be repaired: restore "
            f"{MANIFEST} from a copy (every run folder has one, store.json), or extract into another folder"
        ) from error
    _rewrite_metadata(root, manifest)
    config = replace(ExtractConfig.from_json(manifest.config), store=str(root))
    extract(plan(config, manifest.splits), progress, redo=found.partitions)
    return verify(root, progress=progress)


def _rewrite_metadata(root: Path, manifest: Manifest) -> None:
    """Write the metadata files that are not what they were; they follow from the manifest alone."""
    with storage_errors(root):
        make_folders(root / "staging")
        lock = StoreLock(root)
    try:
        for split in manifest.splits:
            for name, data in split_files(manifest, split).items():
                if _is(root / name, data):
                    continue
                logger.warning("%s is written again", root / name)
                with storage_errors(root):
                    write_durably(root, {name: data})
    finally:
        lock.release()


def _is(file: Path, data: bytes) -> bool:
    try:
        return file.read_bytes() == data
    except OSError:
        return False
