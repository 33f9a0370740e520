"""Makes a damaged store whole again, from its own manifest: what verify finds is extracted anew, no more.

Nothing is deleted before its replacement is there: a partition's old record and files stay until the new ones
are durable. The result has the bytes of a store that was never damaged.
"""

import os
from pathlib import Path

from mmdiff_cache.errors import DamageError, StoreError
from mmdiff_cache.extraction.plan import plan
from mmdiff_cache.extraction.resolve import recorded
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.records import Progress
from mmdiff_cache.store.growth import restore_metadata
from mmdiff_cache.store.manifest import MANIFEST, read_manifest
from mmdiff_cache.store.verify import Verification, verify


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
    restore_metadata(root)
    extract(plan(recorded(manifest, root), manifest.splits), progress, redo=found.partitions)
    return verify(root, progress=progress)
