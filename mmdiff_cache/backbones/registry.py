"""Every backbone by name, and any folder of a known pipeline. No torch until weights are loaded."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdiff_cache.backbones import weights
from mmdiff_cache.backbones.info import (
    PAPER_SINGLE_BLOCKS,
    PAPER_SINGLE_LAYERS,
    PATCH,
    STEPS,
    TIMESTEPS,
    Architecture,
    BackboneInfo,
    DTypeName,
    Quantisation,
    default_concept_blocks,
    default_layers,
    default_width,
    same_depth,
)
from mmdiff_cache.backbones.weights import pipeline_of, tokenizers_of
from mmdiff_cache.errors import BackboneError, ConfigError
from mmdiff_cache.hub import is_repository

if TYPE_CHECKING:
    import torch

    from mmdiff_cache.backbones.base import Backbone
    from mmdiff_cache.backbones.text import EncoderText, TextSource

logger = logging.getLogger(__name__)

GUIDANCE = 3.5
"""FLUX.1-dev's own default; the paper gives none."""
FLUX, SD3 = "FluxPipeline", "StableDiffusion3Pipeline"
MAX_TEXT_LENGTH = 512
"""The longest T5 prompt that FluxPipeline and StableDiffusion3Pipeline take."""
SD3_TEXT_LENGTH, SD3_CLIP_TOKENS = 256, 77
"""T5 and CLIP tokens of StableDiffusion3Pipeline."""
SD3_CFG_SCALE = 7.0
"""Default of StableDiffusion3Pipeline; the named models have that of their cards."""
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
    guidance: float | None
    text_length: int
    aggregator_width: int
    dtype: DTypeName
    licence: str
    architecture: Architecture | None = None
    steps: int = STEPS
    true_cfg_scale: float = 1.0


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
                pipeline=FLUX,
                double_blocks=19,
                single_blocks=38,
                channels=3072,
                latent_channels=16,
                vae_factor=8,
                guidance_embeds=True,
                text_channels=4096,
                pooled_channels=768,
            ),
        ),
        BackboneEntry(
            name="flux-schnell",
            summary="FLUX.1 [schnell], the few-step sibling of flux-dev",
            source="black-forest-labs/FLUX.1-schnell",
            layers=("single.4", "single.15", "single.26", "single.37"),
            timesteps=TIMESTEPS,
            resolution=512,
            guidance=None,
            text_length=256,
            aggregator_width=768,
            dtype="bfloat16",
            licence="Apache-2.0",
            steps=4,
            architecture=Architecture(
                pipeline=FLUX,
                double_blocks=19,
                single_blocks=38,
                channels=3072,
                latent_channels=16,
                vae_factor=8,
                guidance_embeds=False,
                text_channels=4096,
                pooled_channels=768,
            ),
        ),
        *(
            BackboneEntry(
                name=f"sd35-{size}",
                summary=f"Stable Diffusion 3.5 {size}, {parameters} B parameters",
                source=f"stabilityai/stable-diffusion-3.5-{size}",
                layers=tuple(
                    f"double.{k}" for k in same_depth(PAPER_SINGLE_LAYERS, PAPER_SINGLE_BLOCKS, blocks)
                ),
                timesteps=TIMESTEPS,
                resolution=512,
                guidance=None,
                text_length=SD3_TEXT_LENGTH,
                aggregator_width=default_width(64 * blocks),
                dtype="bfloat16",
                licence="Stability AI Community License, to be accepted on the hub before the download",
                architecture=Architecture(
                    pipeline=SD3,
                    double_blocks=blocks,
                    single_blocks=0,
                    channels=64 * blocks,
                    latent_channels=16,
                    vae_factor=8,
                    guidance_embeds=False,
                    text_channels=4096,
                    pooled_channels=2048,
                    clip_tokens=SD3_CLIP_TOKENS,
                ),
                steps=steps,
                true_cfg_scale=scale,
            )
            for size, blocks, parameters, steps, scale in (
                ("medium", 24, 2.5, 40, 4.5),
                ("large", 38, 8.1, 28, 3.5),
            )
        ),
    )
}


def describe(name: str) -> BackboneInfo:
    """What a backbone is and which defaults it has, from its configuration files alone.

    `name` is one of BACKBONES, a folder, or a repository of the hub (`org/name`), whose configuration files
    are fetched where they are not in the local cache. Raises ConfigError for what is none of these,
    BackboneError for another format and for a repository out of reach.
    """
    entry = BACKBONES.get(name)
    if entry is None:
        folder = Path(name).expanduser()
        if not folder.is_dir() and is_repository(name):
            return _describe_repository(name)
        return _describe_folder(folder)
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
        steps=entry.steps,
        true_cfg_scale=entry.true_cfg_scale,
    )


def load_backbone(
    info: BackboneInfo,
    *,
    layers: Sequence[str] | None = None,
    device: "str | torch.device" = "auto",
    dtype: DTypeName | None = None,
    quantisation: Quantisation = "none",
    text_length: int | None = None,
    text: "TextSource | None" = None,
) -> "Backbone":
    """Load a backbone's weights, frozen.

    Single blocks behind the deepest of `layers` are never read from disk; None keeps all, as generating
    pictures needs. `device` is `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:1`.
    With `text` the text encoders are not loaded.

    Raises ConfigError for an unknown layer, BackboneError when weights are missing or damaged.
    """
    info.check_layers(layers or ())
    folder = weights.locate(info, download=True)
    dtype, text_length = dtype or info.dtype, text_length or info.text_length
    if info.architecture.pipeline == FLUX:
        from mmdiff_cache.backbones.flux import load_flux

        return load_flux(
            info,
            folder,
            layers=layers,
            device=device,
            dtype=dtype,
            quantisation=quantisation,
            text_length=text_length,
            text=text,
        )
    from mmdiff_cache.backbones.sd3 import load_sd3

    return load_sd3(
        info,
        folder,
        device=device,
        dtype=dtype,
        quantisation=quantisation,
        text_length=text_length,
        text=text,
    )


def load_text_encoders(
    info: BackboneInfo,
    *,
    device: "str | torch.device" = "auto",
    dtype: DTypeName | None = None,
    text_length: int | None = None,
) -> "EncoderText":
    """Load the text encoders of a backbone alone. Raises as `load_backbone` does."""
    folder = weights.locate(info, download=True)
    dtype, text_length = dtype or info.dtype, text_length or info.text_length
    if info.architecture.pipeline == FLUX:
        from mmdiff_cache.backbones.flux import load_flux_text

        return load_flux_text(info, folder, device=device, dtype=dtype, text_length=text_length)
    from mmdiff_cache.backbones.sd3 import load_sd3_text

    return load_sd3_text(info, folder, device=device, dtype=dtype, text_length=text_length)


def read_architecture(folder: Path) -> Architecture:
    """The shape of the pipeline in a folder. Raises BackboneError when it is not one that can be tapped."""
    pipeline = pipeline_of(folder)
    transformer, vae = _read_json(folder, "transformer/config.json"), _read_json(folder, "vae/config.json")
    try:
        architecture = Architecture(
            pipeline=pipeline,
            double_blocks=transformer["num_layers"],
            single_blocks=transformer["num_single_layers"] if pipeline == FLUX else 0,
            channels=transformer["num_attention_heads"] * transformer["attention_head_dim"],
            latent_channels=vae["latent_channels"],
            vae_factor=2 ** (len(vae["block_out_channels"]) - 1),
            guidance_embeds=transformer["guidance_embeds"] if pipeline == FLUX else False,
            text_channels=transformer["joint_attention_dim"],
            pooled_channels=transformer["pooled_projection_dim"],
            clip_tokens=0 if pipeline == FLUX else _clip_tokens(folder),
        )
        packed = 1 if pipeline == FLUX else transformer["patch_size"] ** 2
    except KeyError as error:
        raise BackboneError(f"a configuration in {folder} has no field {error}") from error
    if transformer["in_channels"] * packed != PATCH**2 * architecture.latent_channels:
        raise BackboneError(
            f"{folder}: the transformer takes {transformer['in_channels'] * packed} channels a token, but "
            f"four latent pixels give {PATCH**2 * architecture.latent_channels}; fill and control variants "
            "cannot be used"
        )
    return architecture


def transformer_config(info: BackboneInfo) -> dict[str, Any]:
    """What the transformer's config.json says, as far as it is on this machine; no weights are needed."""
    folder = Path(info.source)
    return _read_json(folder, "transformer/config.json") if folder.is_absolute() else {}


def _describe_folder(folder: Path) -> BackboneInfo:
    if not folder.is_dir():
        raise ConfigError(
            f"{str(folder)!r} is neither a backbone ({', '.join(BACKBONES)}) nor a folder of a pipeline, "
            "nor a repository of the hub (org/name)"
        )
    folder = folder.resolve()
    weight_bytes = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    small = weight_bytes < SMALL_MODEL_BYTES
    return _describe_files(
        folder, name=folder.name, source=str(folder), dtype="float32" if small else "bfloat16"
    )


def _describe_repository(repository: str) -> BackboneInfo:
    folder = weights.locate_configs(repository)
    return _describe_files(folder, name=repository.rpartition("/")[2], source=repository, dtype="bfloat16")


def _describe_files(folder: Path, *, name: str, source: str, dtype: DTypeName) -> BackboneInfo:
    """Defaults that follow from the configuration files in a folder."""
    architecture = read_architecture(folder)
    native = _read_json(folder, "vae/config.json").get("sample_size") or 512
    return BackboneInfo(
        name=name,
        source=source,
        architecture=architecture,
        layers=default_layers(architecture),
        concept_blocks=default_concept_blocks(architecture),
        timesteps=TIMESTEPS,
        resolution=min(native, MAX_GRID * 2 * architecture.vae_factor),
        guidance=GUIDANCE if architecture.guidance_embeds else None,
        text_length=_text_length(folder, architecture.pipeline),
        aggregator_width=default_width(architecture.channels),
        dtype=dtype,
        licence="see the model's own card",
        true_cfg_scale=SD3_CFG_SCALE if architecture.pipeline == SD3 else 1.0,
    )


def _text_length(folder: Path, pipeline: str) -> int:
    """The T5 tokenizer's own limit where its configuration states one, at most the pipeline's default."""
    name, most = tokenizers_of(pipeline)[-1], MAX_TEXT_LENGTH if pipeline == FLUX else SD3_TEXT_LENGTH
    stated = _read_json(folder, f"{name}/tokenizer_config.json").get("model_max_length", most)
    return min(int(stated), most)


def _clip_tokens(folder: Path) -> int:
    return int(_read_json(folder, "tokenizer/tokenizer_config.json").get("model_max_length", SD3_CLIP_TOKENS))


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BackboneError(
            f"{folder} has no {name}; a backbone is a folder in the format of diffusers' pipelines"
        ) from error
    except ValueError as error:
        raise BackboneError(f"{folder / name} is not JSON: {error}") from error
