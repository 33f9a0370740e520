"""Where a backbone's weights lie, whether all of them are there, and which they are. Needs no torch."""

import hashlib
import json
import re
import textwrap
from pathlib import Path
from typing import Any

from mmdiff_cache.backbones.info import BackboneInfo
from mmdiff_cache.errors import BackboneError

MODELS = ("transformer", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
PATTERNS = ("model_index.json", "scheduler/*", *(f"{part}/*" for part in (*MODELS, *TOKENIZERS)))
"""What is fetched from the hub; the repository's single-file copy of the transformer is not."""
TRY_IT = "runs here now; trained on rendered scenes: for trying the pipeline, not for scores on photographs"


def locate(info: BackboneInfo, *, download: bool = False) -> Path:
    """The folder of a backbone's weights, with every file in place.

    A hub repository is looked up in the local cache first and fetched only if `download` is true.
    Raises BackboneError with the lines that help when weights are missing.
    """
    folder = Path(info.source)
    if not folder.is_absolute():
        return _locate_on_hub(info, download=download)
    if missing := missing_file(folder):
        raise BackboneError(f"the weights of {info.name} are incomplete: {folder / missing} is missing")
    return folder


def missing_file(folder: Path) -> str | None:
    """The first file of the pipeline that is not there, relative to the folder; None when all are."""
    for part in MODELS:
        if not (folder / part / "config.json").is_file():
            return f"{part}/config.json"
    return next((name for name in weight_files(folder) if not (folder / name).is_file()), None)


def weight_files(folder: Path) -> list[str]:
    """The safetensors files that hold the models' weights, relative to the folder, in a fixed order."""
    names: list[str] = []
    for part in MODELS:
        stem = "diffusion_pytorch_model" if part in ("transformer", "vae") else "model"
        index = folder / part / f"{stem}.safetensors.index.json"
        shards = _shards(index) if index.is_file() else [f"{stem}.safetensors"]
        names += [f"{part}/{shard}" for shard in shards]
    return names


def hash_weights(folder: Path) -> str:
    """SHA-256 (hex) that tells this backbone's features from another's.

    Taken over the lines `<path> <SHA-256 of the file>` of every model configuration, weight file and
    tokenizer file. The hub's cache keeps a file under its own SHA-256, so its gigabytes are not read again.
    """
    tokenizers = [
        file.relative_to(folder).as_posix()
        for part in TOKENIZERS
        for file in sorted((folder / part).iterdir())
        if file.is_file()
    ]
    configs = [f"{part}/config.json" for part in MODELS]
    lines = [
        f"{name} {_hash_file(folder / name)}\n" for name in (*configs, *weight_files(folder), *tokenizers)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _shards(index: Path) -> list[str]:
    content: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    return sorted(set(content["weight_map"].values()))


def _hash_file(path: Path) -> str:
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locate_on_hub(info: BackboneInfo, *, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = list(PATTERNS)
    try:
        folder = Path(snapshot_download(info.source, allow_patterns=patterns, local_files_only=True))
        if missing_file(folder) is None:
            return folder
        reason = f"{missing_file(folder)} is not in the local cache"
    except LocalEntryNotFoundError:
        reason = "not in the local cache"
    if not download:
        raise _weights_missing(info, reason)
    try:
        return Path(snapshot_download(info.source, allow_patterns=patterns))
    except Exception as error:  # the hub client's network errors have changed class from release to release
        said = textwrap.shorten(str(error), 100, placeholder=" ...")
        raise _weights_missing(info, f"{reason}, and the hub gave: {said}") from error


def _weights_missing(info: BackboneInfo, reason: str) -> BackboneError:
    return BackboneError(
        f"the weights of {info.name} are not on this machine ({reason}). One of these helps:\n"
        f"  accept the licence at https://huggingface.co/{info.source}, then: hf auth login\n"
        f"  --backbone FOLDER        a folder in diffusers' FluxPipeline format\n"
        f"  --backbone flux-scenes   {TRY_IT}"
    )
