"""Where an encoder's weights lie, whether all of them are there, and which they are. Needs no torch."""

import json
from pathlib import Path
from typing import Any

from mmdiff_cache.encoders.info import EncoderInfo
from mmdiff_cache.errors import BackboneError
from mmdiff_cache.hub import find_snapshot, hash_files, model_files

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model"
MODEL_TYPE = "dinov3_vit"


def locate(info: EncoderInfo, *, download: bool = False) -> Path:
    """The folder of an encoder's weights, with every file in place.

    A hub repository is looked up in the local cache first and fetched only if `download` is true.
    Raises BackboneError with the lines that help when weights are missing.
    """
    folder = Path(info.source)
    if folder.is_absolute():
        if missing := missing_file(folder):
            raise BackboneError(f"the weights of {info.name} are incomplete: {folder / missing} is missing")
        return folder
    patterns = [CONFIG, PROCESSOR, f"{WEIGHTS}*.safetensors", f"{WEIGHTS}.safetensors.index.json"]

    def refuse(reason: str) -> BackboneError:
        return _weights_missing(info, reason)

    return find_snapshot(info.source, patterns, missing_file, refuse, download=download)


def missing_file(folder: Path) -> str | None:
    """The first file of the encoder that is not there, relative to the folder; None when all are."""
    return next((name for name in _files(folder) if not (folder / name).is_file()), None)


def hash_encoder(folder: Path) -> str:
    """SHA-256 (hex) over configuration, normalisation and weights: tells one encoder from another."""
    return hash_files(folder, _files(folder))


def read_shape(folder: Path) -> tuple[int, int, int]:
    """Blocks, channels and patch of the model in a folder. Raises BackboneError when it is no DINOv3 ViT."""
    config = read_json(folder, CONFIG)
    if config.get("model_type") != MODEL_TYPE:
        raise BackboneError(
            f"{folder} holds a model of type {config.get('model_type')!r}; a discriminative encoder is a "
            f"folder of {MODEL_TYPE} in transformers' format"
        )
    shape = [config.get(name) for name in ("num_hidden_layers", "hidden_size", "patch_size")]
    blocks, channels, patch = (value if type(value) is int else 0 for value in shape)
    if min(blocks, channels, patch) < 1:
        raise BackboneError(f"{folder / CONFIG} must give blocks, channels and patch as numbers, got {shape}")
    return blocks, channels, patch


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """One of the folder's JSON files. Raises BackboneError where it is missing or none."""
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except OSError as error:
        raise BackboneError(
            f"{folder} has no {name}; a discriminative encoder is a folder in transformers' format"
        ) from error
    except (ValueError, TypeError) as error:
        raise BackboneError(f"{folder / name} is not a JSON object: {error}") from error


def _files(folder: Path) -> list[str]:
    return [CONFIG, PROCESSOR, *model_files(folder, WEIGHTS)]


def _weights_missing(info: EncoderInfo, reason: str) -> BackboneError:
    return BackboneError(
        f"the weights of {info.name} are not on this machine ({reason}). One of these helps:\n"
        f"  accept the DINOv3 License at https://huggingface.co/{info.source}, then: hf auth login\n"
        "  --discriminative FOLDER   a folder with config.json, preprocessor_config.json and safetensors\n"
        "  without --discriminative  the features of the diffusion transformer alone"
    )
