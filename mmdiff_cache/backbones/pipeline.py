"""What FLUX and SD3 have in common as pipelines of diffusers: loading, the VAE, prompts, refusals."""

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from mmdiff_cache.backbones.attention import use_attention
from mmdiff_cache.backbones.base import Backbone, BlockSlot, PromptEmbeddings, Sampler
from mmdiff_cache.backbones.info import PATCH, BackboneInfo, DTypeName, Quantisation
from mmdiff_cache.backbones.text import TextSource
from mmdiff_cache.backbones.weights import hash_weights, text_parts_of
from mmdiff_cache.errors import BackboneError, ConfigError
from mmdiff_cache.pretrained import full_precision_convolutions, load_whole, quiet_loading

logger = logging.getLogger(__name__)

DTYPES: Mapping[DTypeName, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOAT8 = torch.float8_e4m3fn
TEXT_ENCODERS: Mapping[str, tuple[Any, ...]] = {
    "FluxPipeline": (CLIPTextModel, T5EncoderModel),
    "StableDiffusion3Pipeline": (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel),
}
"""The classes of a pipeline's text encoders, in their order."""


class PipelineBackbone(Backbone):
    """A diffusers pipeline whose transformer may lack its last blocks."""

    def __init__(self, info: BackboneInfo, pipeline: Any, *, folder: Path, text: TextSource) -> None:
        self.info = info
        self._folder, self._text = folder, text
        self._transformer: Any = pipeline.transformer
        self._vae = cast(AutoencoderKL, pipeline.vae)
        self._scheduler: Any = pipeline.scheduler
        self.device = cast(torch.device, self._transformer.device)
        self.dtype = cast(torch.dtype, self._transformer.dtype)
        self._blocks = self._list_blocks()
        for name in ("transformer", "vae"):
            cast(nn.Module, getattr(pipeline, name)).requires_grad_(False).eval()

    @abstractmethod
    def _list_blocks(self) -> dict[str, BlockSlot]:
        """The transformer's blocks by address, in the order in which they run."""

    @property
    def blocks(self) -> Mapping[str, BlockSlot]:
        return self._blocks

    def identity(self) -> dict[str, str]:
        return {
            "pipeline": self.info.architecture.pipeline,
            "weights_sha256": hash_weights(self._folder),
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantisation": quantisation_of(self._transformer),
        }

    def use_attention(self, name: str) -> None:
        self.info.check_attention(name)
        with quiet_loading():
            use_attention(self._transformer, name)

    @torch.inference_mode()
    def encode_image(self, images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B c H_f W_f"]:
        # Channels-last in memory, as diffusers' image processor leaves it: a convolution's bits depend on it.
        pixels = rearrange(images.to(self.device), "B H W rgb -> B rgb H W").to(torch.float32) / 255 * 2 - 1
        with full_precision_convolutions():
            posterior = cast(Any, self._vae.encode(pixels)).latent_dist
        config = cast(Any, self._vae.config)
        return (posterior.mode() - (config.shift_factor or 0.0)) * config.scaling_factor

    @torch.inference_mode()
    def decode_latent(self, latent: Float[Tensor, "B c H_f W_f"]) -> UInt8[Tensor, "B H W 3"]:
        config = cast(Any, self._vae.config)
        scaled = latent.to(self.device, torch.float32) / config.scaling_factor + (config.shift_factor or 0.0)
        with full_precision_convolutions():
            pixels = cast(Tensor, self._vae.decode(scaled, return_dict=False)[0])
        levels = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return rearrange(levels, "B rgb H W -> B H W rgb")

    def sampler(self, steps: int, resolution: int) -> Sampler:
        given = self._scheduler
        if type(given) is not FlowMatchEulerDiscreteScheduler or cast(Any, given.config).stochastic_sampling:
            raise BackboneError(
                f"pictures are drawn with a FlowMatchEulerDiscreteScheduler without stochastic_sampling; "
                f"{self.info.name} has a {type(given).__name__}, which is set in its scheduler_config.json"
            )
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(given.config)
        config = scheduler.config
        shift = cast(Any, calculate_shift)(
            math.prod(self.info.token_grid(resolution)),
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
        mu = {"mu": shift} if config.use_dynamic_shifting else {}
        scheduler.set_timesteps(**self._schedule(steps), **mu, device=self.device)
        scheduler.set_begin_index(0)
        return cast(Sampler, scheduler)

    @abstractmethod
    def _schedule(self, steps: int) -> dict[str, Any]:
        """What the pipeline hands to `set_timesteps`, beside the shift for the number of tokens."""

    def pack(self, latent: Float[Tensor, "B c H_f W_f"]) -> Float[Tensor, "B h w P"]:
        return rearrange(latent, "B c (h dy) (w dx) -> B h w (c dy dx)", dy=PATCH, dx=PATCH)

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        encoded = [self._text.prompt(prompt) for prompt in prompts]
        return PromptEmbeddings(
            tokens=torch.cat([tokens for tokens, _ in encoded]),
            pooled=torch.cat([pooled for _, pooled in encoded]),
        )

    @torch.inference_mode()
    def embed_concepts(self, words: Sequence[str]) -> Float[Tensor, "K C"]:
        """Each word alone through T5 (`TextSource.word`), then the model's text embedding."""
        vectors = torch.stack([self._text.word(word) for word in words])
        return cast(Tensor, self._transformer.context_embedder(vectors))


def load_pipeline(
    info: BackboneInfo,
    folder: Path,
    pipeline_class: type[DiffusionPipeline],
    transformer_class: Any,
    *,
    device: str | torch.device,
    dtype: DTypeName,
    quantisation: Quantisation,
    with_text: bool,
    **options: Any,
) -> Any:
    """A pipeline on its device, with or without text encoders; `options` go to the transformer.

    The VAE always runs in float32.

    Raises BackboneError when the weights cannot be loaded, ConfigError for a device that is not there.
    """
    chosen = choose_device(device)
    logger.info("loading %s from %s: %s, %s", info.name, folder, dtype, chosen)
    transformer = load_whole(
        transformer_class, folder / "transformer", info.name, torch_dtype=DTYPES[dtype], **options
    )
    vae = load_whole(AutoencoderKL, folder / "vae", info.name, torch_dtype=torch.float32)
    absent = dict.fromkeys(text_parts_of(info.architecture.pipeline))
    text = _text_encoders(info, folder, dtype) if with_text else absent
    pipeline = _assemble(info, folder, pipeline_class, dtype, transformer=transformer, vae=vae, **text)
    if quantisation == "float8":
        transformer.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(chosen)


def load_text_pipeline(
    info: BackboneInfo,
    folder: Path,
    pipeline_class: type[DiffusionPipeline],
    *,
    device: str | torch.device,
    dtype: DTypeName,
) -> Any:
    """The text encoders of a pipeline on their device, without transformer and VAE."""
    chosen = choose_device(device)
    logger.info("loading the text encoders of %s from %s: %s, %s", info.name, folder, dtype, chosen)
    text = _text_encoders(info, folder, dtype)
    return _assemble(info, folder, pipeline_class, dtype, transformer=None, vae=None, **text).to(chosen)


def _text_encoders(info: BackboneInfo, folder: Path, dtype: DTypeName) -> dict[str, Any]:
    classes = TEXT_ENCODERS[info.architecture.pipeline]
    parts = text_parts_of(info.architecture.pipeline)[: len(classes)]
    return {
        part: load_whole(model_class, folder / part, info.name, dtype=DTYPES[dtype])
        for part, model_class in zip(parts, classes, strict=True)
    }


def _assemble(
    info: BackboneInfo, folder: Path, pipeline_class: type[DiffusionPipeline], dtype: DTypeName, **parts: Any
) -> Any:
    """A pipeline of these parts, with tokenizers and scheduler from its folder."""
    try:
        with quiet_loading():
            return cast(Any, pipeline_class).from_pretrained(
                folder, torch_dtype=DTYPES[dtype], local_files_only=True, **parts
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise BackboneError(f"{info.name} in {folder} cannot be loaded: {error}") from error


def choose_device(device: str | torch.device) -> torch.device:
    """`auto` is the GPU where there is one. Raises ConfigError for a device that is not there."""
    present = torch.cuda.device_count()
    if device == "auto":
        return torch.device("cuda" if present else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:<number>, got {device!r}") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= present:
        raise ConfigError(
            f"device {device} is not on this machine, which has {present} CUDA devices; try auto"
        )
    return chosen


def quantisation_of(transformer: nn.Module) -> Quantisation:
    """How the weights of a loaded transformer lie in memory."""
    return "float8" if any(p.dtype == FLOAT8 for p in transformer.parameters()) else "none"


def check_plain(transformer: Any) -> None:
    """Raise BackboneError for an acceleration that hands the taps something else than the blocks' outputs."""
    if getattr(transformer, "is_cache_enabled", False):
        raise BackboneError(
            "a step cache is enabled, which returns stale block outputs; call disable_cache() first"
        )
    if getattr(transformer, "_parallel_config", None) is not None:
        raise BackboneError(
            "the transformer is sharded, so blocks see a part of the tokens; use one GPU a process"
        )
    if any(getattr(module, "fused_projections", False) for module in transformer.modules()):
        raise BackboneError("the QKV projections are fused; call unfuse_qkv_projections() first")
