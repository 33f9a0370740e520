"""Where a backbone's weights lie, whether all of them are there, and which they are. Needs no torch."""

import json
from collections.abc import Mapping
from pathlib import Path

from mmdiff_cache.backbones.info import BackboneInfo
from mmdiff_cache.errors import BackboneError
from mmdiff_cache.hub import find_snapshot, hash_files, model_files

ENCODERS: Mapping[str, int] = {"FluxPipeline": 2, "StableDiffusion3Pipeline": 3}
"""How many text encoders, each with a tokenizer, a pipeline has."""
CONFIGS = ("model_index.json", "*/config.json", "*/tokenizer_config.json")
"""Files of a hub repository from which a backbone is described."""
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


def locate_configs(repository: str) -> Path:
    """The folder of a hub repository's configuration files; fetches them where they are not in the cache.

    Raises BackboneError with the lines that help when they cannot be had.
    """

    def refuse(reason: str) -> BackboneError:
        return BackboneError(
            f"the configuration of {repository} cannot be had ({reason}). One of these helps:\n"
            f"  hf download {repository}   where there is a network\n"
            "  hf auth login              for a repository with a licence to accept\n"
            f"  --backbone flux-scenes     {TRY_IT}"
        )

    return find_snapshot(repository, CONFIGS, _missing_config, refuse, download=True)


def _missing_config(folder: Path) -> str | None:
    """The first of the files from which a pipeline is described that is not there; None when all are."""
    if not (folder / "model_index.json").is_file():
        return "model_index.json"
    needed = [f"{part}/config.json" for part in ("transformer", "vae")]
    needed += [f"{part}/tokenizer_config.json" for part in tokenizers_of(pipeline_of(folder))]
    return next((name for name in needed if not (folder / name).is_file()), None)


def models_of(pipeline: str) -> tuple[str, ...]:
    """The parts of a pipeline that have weights, as its folders are called."""
    return ("transformer", "vae", *_numbered("text_encoder", pipeline))


def tokenizers_of(pipeline: str) -> tuple[str, ...]:
    """The tokenizers of a pipeline."""
    return _numbered("tokenizer", pipeline)


def text_parts_of(pipeline: str) -> tuple[str, ...]:
    """Text encoders and tokenizers of a pipeline."""
    return (*_numbered("text_encoder", pipeline), *tokenizers_of(pipeline))


def weight_bytes(folder: Path) -> int:
    """Size of all weight files of a pipeline."""
    return sum((folder / name).stat().st_size for name in weight_files(folder))


def _numbered(part: str, pipeline: str) -> tuple[str, ...]:
    return (part, *(f"{part}_{n}" for n in range(2, ENCODERS[pipeline] + 1)))


def pipeline_of(folder: Path) -> str:
    """The class that a folder's model_index.json names. Raises BackboneError for one that is not known."""
    try:
        name = str(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(f"{folder} has no model_index.json that names a pipeline ({error})") from error
    if name not in ENCODERS:
        raise BackboneError(f"{folder} holds a {name}; backbones are folders of {' or '.join(ENCODERS)}")
    return name


def missing_file(folder: Path) -> str | None:
    """The first file of the pipeline that is not there, relative to the folder; None when all are."""
    if not (folder / "model_index.json").is_file():
        return "model_index.json"
    for part in models_of(pipeline_of(folder)):
        if not (folder / part / "config.json").is_file():
            return f"{part}/config.json"
    return next((name for name in weight_files(folder) if not (folder / name).is_file()), None)


def weight_files(folder: Path) -> list[str]:
    """The safetensors files that hold the models' weights, relative to the folder, in a fixed order."""
    names: list[str] = []
    for part in models_of(pipeline_of(folder)):
        stem = "diffusion_pytorch_model" if part in ("transformer", "vae") else "model"
        names += [f"{part}/{shard}" for shard in model_files(folder / part, stem)]
    return names


def hash_weights(folder: Path) -> str:
    """SHA-256 (hex) that tells this backbone's features from another's.

    Taken over the lines `<path> <SHA-256 of the file>` of every model configuration, weight file and
    tokenizer file. The hub's cache keeps a file under its own SHA-256, so its gigabytes are not read again.
    """
    tokenizers = [
        file.relative_to(folder).as_posix()
        for part in tokenizers_of(pipeline_of(folder))
        for file in sorted((folder / part).iterdir())
        if file.is_file()
    ]
    configs = [f"{part}/config.json" for part in models_of(pipeline_of(folder))]
    return hash_files(folder, (*configs, *weight_files(folder), *tokenizers))


def _locate_on_hub(info: BackboneInfo, *, download: bool) -> Path:
    pipeline = info.architecture.pipeline  # a repository's single-file copy of the transformer is not fetched
    folders = (*models_of(pipeline), *tokenizers_of(pipeline), "scheduler")
    patterns = ["model_index.json", *(f"{part}/*" for part in folders)]

    def refuse(reason: str) -> BackboneError:
        return _weights_missing(info, reason)

    return find_snapshot(info.source, patterns, missing_file, refuse, download=download)


def _weights_missing(info: BackboneInfo, reason: str) -> BackboneError:
    return BackboneError(
        f"the weights of {info.name} are not on this machine ({reason}). One of these helps:\n"
        f"  accept the licence at https://huggingface.co/{info.source}, then: hf auth login\n"
        f"  --backbone FOLDER        a folder in diffusers' {info.architecture.pipeline} format\n"
        f"  --backbone flux-scenes   {TRY_IT}"
    )
