"""Every backbone by name, and any folder in FluxPipeline's format. No torch until weights are loaded."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdiff_cache.backbones.info import (
    TIMESTEPS,
    Architecture,
    BackboneInfo,
    DTypeName,
    default_concept_blocks,
    default_layers,
    default_width,
)
from mmdiff_cache.errors import BackboneError, ConfigError

if TYPE_CHECKING:
    import torch

    from mmdiff_cache.backbones.base import Backbone

logger = logging.getLogger(__name__)

GUIDANCE = 3.5
"""FLUX.1-dev's own default; the paper gives none."""
MAX_TEXT_LENGTH = 512
"""The longest T5 prompt that FluxPipeline takes."""
MAX_GRID = 32
"""Tokens a side by default: the paper's 1024 tokens."""
SMALL_MODEL_BYTES = 1 << 30
"""A transformer whose weight files are smaller runs in float32 by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneEntry:
    """One named backbone. `architecture` is given where the weights may be absent when a run is planned."""

    name: str
    summary: str
    source: str
    layers: tuple[str, ...]
    timesteps: tuple[float, ...]
    resolution: int
    guidance: float
    text_length: int
    aggregator_width: int
    dtype: DTypeName
    licence: str
    architecture: Architecture | None = None


BACKBONES: Mapping[str, BackboneEntry] = {
    entry.name: entry
    for entry in (
        BackboneEntry(
            name="flux-scenes",
            summary="the bundled small FLUX, trained on rendered scenes",
            source=str(files("mmdiff_cache") / "assets" / "flux-scenes"),
            layers=("single.1", "single.4", "single.8", "single.11"),
            timesteps=TIMESTEPS,
            resolution=128,
            guidance=GUIDANCE,
            text_length=48,
            aggregator_width=64,
            dtype="float32",
            licence="Apache-2.0",
        ),
        BackboneEntry(
            name="flux-dev",
            summary="FLUX.1 [dev], 12 B parameters, the paper's backbone",
            source="black-forest-labs/FLUX.1-dev",
            layers=("single.4", "single.15", "single.26", "single.37"),
            timesteps=TIMESTEPS,
            resolution=512,
            guidance=GUIDANCE,
            text_length=MAX_TEXT_LENGTH,
            aggregator_width=768,
            dtype="bfloat16",
            licence="FLUX.1 [dev] Non-Commercial License, to be accepted on the hub before the download",
            architecture=Architecture(
                pipeline="FluxPipeline",
                double_blocks=19,
                single_blocks=38,
                channels=3072,
                latent_channels=16,
                vae_factor=8,
                guidance_embeds=True,
            ),
        ),
    )
}


def describe(name_or_folder: str) -> BackboneInfo:
    """What a backbone is and which defaults it has, from its configuration files alone.

    Raises ConfigError for what is neither a name nor a folder, BackboneError for a folder of another format.
    """
    entry = BACKBONES.get(name_or_folder)
    if entry is None:
        return _describe_folder(Path(name_or_folder).expanduser())
    architecture = entry.architecture or read_architecture(Path(entry.source))
    return BackboneInfo(
        name=entry.name,
        source=entry.source,
        architecture=architecture,
        layers=entry.layers,
        concept_blocks=default_concept_blocks(architecture),
        timesteps=entry.timesteps,
        resolution=entry.resolution,
        guidance=entry.guidance,
        text_length=entry.text_length,
        aggregator_width=entry.aggregator_width,
        dtype=entry.dtype,
        licence=entry.licence,
    )


def load_backbone(
    info: BackboneInfo,
    *,
    layers: Sequence[str] | None = None,
    device: "str | torch.device" = "auto",
    dtype: DTypeName | None = None,
    text_length: int | None = None,
) -> "Backbone":
    """Load a backbone's weights, frozen.

    Single blocks behind the deepest of `layers` are never read from disk; None keeps all, as generating
    pictures needs. `device` is `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:1`.

    Raises ConfigError for an unknown layer, BackboneError when weights are missing or damaged.
    """
    info.check_layers(layers or ())
    from mmdiff_cache.backbones import flux, weights

    return flux.load_flux(
        info,
        weights.locate(info, download=True),
        layers=layers,
        device=device,
        dtype=dtype or info.dtype,
        text_length=text_length or info.text_length,
    )


def read_architecture(folder: Path) -> Architecture:
    """The shape of the pipeline in a folder. Raises BackboneError when it is not one that can be tapped."""
    index = _read_json(folder, "model_index.json")
    if index.get("_class_name") != "FluxPipeline":
        raise BackboneError(
            f"{folder} holds a {index.get('_class_name')}; backbones are FluxPipeline folders"
        )
    transformer, vae = _read_json(folder, "transformer/config.json"), _read_json(folder, "vae/config.json")
    try:
        architecture = Architecture(
            pipeline="FluxPipeline",
            double_blocks=transformer["num_layers"],
            single_blocks=transformer["num_single_layers"],
            channels=transformer["num_attention_heads"] * transformer["attention_head_dim"],
            latent_channels=vae["latent_channels"],
            vae_factor=2 ** (len(vae["block_out_channels"]) - 1),
            guidance_embeds=transformer["guidance_embeds"],
        )
    except KeyError as error:
        raise BackboneError(f"a configuration in {folder} has no field {error}") from error
    if transformer["in_channels"] != 4 * architecture.latent_channels:
        raise BackboneError(
            f"{folder}: the transformer takes {transformer['in_channels']} channels a token, but four latent "
            f"pixels give {4 * architecture.latent_channels}; fill and control variants cannot be used"
        )
    return architecture


def _describe_folder(folder: Path) -> BackboneInfo:
    if not folder.is_dir():
        raise ConfigError(
            f"{str(folder)!r} is neither a backbone ({', '.join(BACKBONES)}) nor a folder of a FluxPipeline"
        )
    folder = folder.resolve()
    architecture = read_architecture(folder)
    native = _read_json(folder, "vae/config.json").get("sample_size") or 512
    weight_bytes = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    return BackboneInfo(
        name=folder.name,
        source=str(folder),
        architecture=architecture,
        layers=default_layers(architecture),
        concept_blocks=default_concept_blocks(architecture),
        timesteps=TIMESTEPS,
        resolution=min(native, MAX_GRID * 2 * architecture.vae_factor),
        guidance=GUIDANCE if architecture.guidance_embeds else None,
        text_length=_text_length(folder),
        aggregator_width=default_width(architecture.channels),
        dtype="float32" if weight_bytes < SMALL_MODEL_BYTES else "bfloat16",
        licence="see the model's own card",
    )


def _text_length(folder: Path) -> int:
    """The T5 tokenizer's own limit where its configuration states one that FluxPipeline can take."""
    stated = _read_json(folder, "tokenizer_2/tokenizer_config.json").get("model_max_length", MAX_TEXT_LENGTH)
    return min(int(stated), MAX_TEXT_LENGTH)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BackboneError(
            f"{folder} has no {name}; a backbone is a folder in FluxPipeline's format"
        ) from error
    except ValueError as error:
        raise BackboneError(f"{folder / name} is not JSON: {error}") from error
