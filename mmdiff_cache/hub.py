"""Files of published models: in the hub's local cache, fetched from the hub, and told apart by their hashes.

Needs no torch.
"""

import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmdiff_cache.errors import BackboneError


def is_repository(name: str) -> bool:
    """Whether a name has the form of a repository on the hub: `org/name`."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def find_snapshot(
    source: str,
    patterns: Sequence[str],
    missing: Callable[[Path], str | None],
    refuse: Callable[[str], BackboneError],
    *,
    download: bool,
) -> Path:
    """The folder of a hub repository, from the local cache or, where `download` is true, from the hub.

    `missing` names a file that a folder lacks; `refuse` makes the error to raise out of a reason.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source, allow_patterns=list(patterns), local_files_only=True))
        if missing(folder) is None:
            return folder
        reason = f"{missing(folder)} is not in the local cache"
    except LocalEntryNotFoundError:
        reason = "not in the local cache"
    if not download:
        raise refuse(reason)
    try:
        folder = Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client's network errors have changed class from release to release
        said = textwrap.shorten(str(error), 100, placeholder=" ...")
        raise refuse(f"{reason}, and the hub gave: {said}") from error
    if lacking := missing(folder):  # offline, the client hands out what it has
        raise refuse(f"{lacking} is not in the local cache, and the hub did not give it")
    return folder


def model_files(folder: Path, stem: str) -> list[str]:
    """The safetensors files of one model in its folder: those that its index lists, or the only one."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [f"{stem}.safetensors"]
    content: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    return sorted(set(content["weight_map"].values()))


def hash_files(folder: Path, names: Sequence[str]) -> str:
    """SHA-256 (hex) over the lines `<path> <SHA-256 of the file>` of these files, in this order."""
    lines = [f"{name} {_hash_file(folder / name)}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    """The hub's cache keeps a file under its own SHA-256, so its gigabytes are not read again."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
