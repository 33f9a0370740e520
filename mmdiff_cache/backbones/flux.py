"""FLUX.1 and its relatives in diffusers' FluxPipeline format."""

import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.utils import logging as diffusers_logging
from einops import rearrange
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from mmdiff_cache.backbones.base import Backbone, BlockSlot, PromptEmbeddings
from mmdiff_cache.backbones.info import PATCH, BackboneInfo, DTypeName
from mmdiff_cache.backbones.weights import hash_weights
from mmdiff_cache.errors import BackboneError, ConfigError

logger = logging.getLogger(__name__)

DTYPES: Mapping[DTypeName, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT_CACHE = 64
"""Encoded prompts kept; one of FLUX.1-dev takes 4 MiB."""


class FluxBackbone(Backbone):
    """A FluxPipeline whose transformer may lack its last single blocks."""

    def __init__(self, info: BackboneInfo, pipeline: FluxPipeline, *, folder: Path, text_length: int) -> None:
        self.info = info
        self._pipeline = pipeline
        self._folder = folder
        self._transformer = cast(FluxTransformer2DModel, pipeline.transformer)
        self._vae = cast(AutoencoderKL, pipeline.vae)
        self.device = self._transformer.device
        self.dtype = self._transformer.dtype
        self._text_length = text_length
        self._prompts: dict[str, tuple[Tensor, Tensor]] = {}
        self._blocks = _list_blocks(self._transformer)
        for module in (self._transformer, self._vae, pipeline.text_encoder, pipeline.text_encoder_2):
            cast(nn.Module, module).requires_grad_(False).eval()

    @property
    def blocks(self) -> Mapping[str, BlockSlot]:
        return self._blocks

    def identity(self) -> dict[str, str]:
        quantisation = getattr(self._transformer.config, "quantization_config", None) or {}
        return {
            "pipeline": self.info.architecture.pipeline,
            "weights_sha256": hash_weights(self._folder),
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantisation": str(quantisation.get("quant_method", "none")),
        }

    @torch.inference_mode()
    def encode_image(self, images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B c H_f W_f"]:
        # Channels-last in memory, as diffusers' image processor leaves it: a convolution's bits depend on it.
        pixels = rearrange(images.to(self.device), "B H W rgb -> B rgb H W").to(torch.float32) / 255 * 2 - 1
        with _full_precision_convolutions():
            posterior = cast(Any, self._vae.encode(pixels)).latent_dist
        config = cast(Any, self._vae.config)
        return (posterior.mode() - (config.shift_factor or 0.0)) * config.scaling_factor

    def pack(self, latent: Float[Tensor, "B c H_f W_f"]) -> Float[Tensor, "B h w P"]:
        return rearrange(latent, "B c (h dy) (w dx) -> B h w (c dy dx)", dy=PATCH, dx=PATCH)

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        encoded = [self._encode_prompt(prompt) for prompt in prompts]
        return PromptEmbeddings(
            tokens=torch.cat([tokens for tokens, _ in encoded]),
            pooled=torch.cat([pooled for _, pooled in encoded]),
        )

    @torch.inference_mode()
    def forward(
        self,
        noised: Float[Tensor, "B c H_f W_f"],
        t: Float[Tensor, " B"],
        prompts: PromptEmbeddings,
        guidance: float | None,
    ) -> Float[Tensor, "B c H_f W_f"]:
        _check_plain(self._transformer)
        packed = self.pack(noised.to(self.device))
        height, width = packed.shape[1:3]
        velocity = self._transformer(
            hidden_states=rearrange(packed, "B h w P -> B (h w) P").to(self.dtype),
            timestep=t.to(self.device),
            guidance=self._guidance(guidance, len(noised)),
            pooled_projections=prompts.pooled,
            encoder_hidden_states=prompts.tokens,
            txt_ids=torch.zeros(prompts.tokens.shape[1], 3, device=self.device),
            img_ids=_image_ids(height, width, self.device),
            return_dict=False,
        )[0]
        return rearrange(
            velocity, "B (h w) (c dy dx) -> B c (h dy) (w dx)", h=height, w=width, dy=PATCH, dx=PATCH
        )

    @torch.inference_mode()
    def embed_concepts(self, words: Sequence[str]) -> Float[Tensor, "K C"]:
        """Each word alone through T5, then the model's text embedding.

        ConceptAttention takes a word's first piece, which reads 'skyscraper' as 'sky'. Here it is the mean
        over the word's own pieces, the same thing wherever a word is one piece.
        """
        vectors: list[Tensor] = []
        for word in words:
            pieces = len(self._pipeline.tokenizer_2(word, add_special_tokens=False).input_ids)
            if pieces == 0:
                raise ConfigError(f"concept {word!r} has no token in the text encoder of {self.info.name}")
            tokens, _ = self._encode_prompt(word)
            vectors.append(tokens[0, :pieces].to(torch.float32).mean(dim=0).to(tokens.dtype))
        return cast(Tensor, self._transformer.context_embedder(torch.stack(vectors)))

    @torch.inference_mode()
    def concept_modulation(self, t: Float[Tensor, " B"], guidance: float | None) -> Float[Tensor, "B C"]:
        config = cast(Any, self._transformer.config)
        pooled = torch.zeros(len(t), config.pooled_projection_dim, device=self.device, dtype=self.dtype)
        scale = self._guidance(guidance, len(t))
        # The transformer's forward scales both by 1000 in the model's dtype; so it is done here.
        times = [value.to(self.dtype) * 1000 for value in (t.to(self.device), scale) if value is not None]
        return cast(Tensor, self._transformer.time_text_embed(*times, pooled))

    def _guidance(self, guidance: float | None, batch: int) -> Float[Tensor, " B"] | None:
        if not self.info.architecture.guidance_embeds:
            return None
        if guidance is None:
            raise ConfigError(f"{self.info.name} takes a guidance scale; its default is {self.info.guidance}")
        return torch.full((batch,), guidance, device=self.device, dtype=torch.float32)

    def _encode_prompt(self, prompt: str) -> tuple[Tensor, Tensor]:
        """[1 S E] and [1 E_pooled]. One prompt a pass, so that a cached one equals a new one bit for bit."""
        if prompt not in self._prompts:
            tokens, pooled, _ = self._pipeline.encode_prompt(
                prompt=prompt, prompt_2=prompt, device=self.device, max_sequence_length=self._text_length
            )
            if len(self._prompts) == PROMPT_CACHE:
                self._prompts.pop(next(iter(self._prompts)))
            self._prompts[prompt] = cast(Tensor, tokens), cast(Tensor, pooled)
        return self._prompts[prompt]


def load_flux(
    info: BackboneInfo,
    folder: Path,
    *,
    layers: Sequence[str] | None,
    device: str | torch.device,
    dtype: DTypeName,
    text_length: int,
) -> FluxBackbone:
    """Load a FluxPipeline folder; see `registry.load_backbone`. The VAE always runs in float32."""
    chosen, depth = _choose_device(device), _single_blocks_needed(info, layers)
    logger.info("loading %s from %s: %d single blocks, %s, %s", info.name, folder, depth, dtype, chosen)
    local = {"use_safetensors": True, "local_files_only": True}
    try:
        with _quiet_loading():
            transformer = FluxTransformer2DModel.from_pretrained(
                folder, subfolder="transformer", num_single_layers=depth, torch_dtype=DTYPES[dtype], **local
            )
            vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, **local)
            pipeline = FluxPipeline.from_pretrained(
                folder, transformer=transformer, vae=vae, torch_dtype=DTYPES[dtype], **local
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BackboneError(f"the weights of {info.name} in {folder} cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return FluxBackbone(info, pipeline.to(chosen), folder=folder, text_length=text_length)


def _choose_device(device: str | torch.device) -> torch.device:
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


@contextmanager
def _quiet_loading() -> Generator[None]:
    """Hide the loaders' progress bars, and their remarks on the blocks that are left out on purpose."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    with warnings.catch_warnings():
        # Diffusers before 0.40 knows no other name for the argument.
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
        try:
            for library in libraries:
                library.set_verbosity_error()
                library.disable_progress_bar()
            yield
        finally:
            for library, (verbosity, bars) in zip(libraries, before, strict=True):
                library.set_verbosity(verbosity)
                if bars:
                    library.enable_progress_bar()


def _single_blocks_needed(info: BackboneInfo, layers: Sequence[str] | None) -> int:
    if layers is None:
        return info.architecture.single_blocks
    return 1 + max(
        (int(layer.removeprefix("single.")) for layer in layers if layer.startswith("single.")), default=-1
    )


def _list_blocks(transformer: FluxTransformer2DModel) -> dict[str, BlockSlot]:
    return {
        f"{kind}.{index}": BlockSlot(block=block, container=container, index=index)
        for kind, container in (
            ("double", transformer.transformer_blocks),
            ("single", transformer.single_transformer_blocks),
        )
        for index, block in enumerate(container)
    }


@contextmanager
def _full_precision_convolutions() -> Generator[None]:
    """Keep a GPU from rounding convolutions to TF32, which would change latents in the third digit."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    ):
        yield


def _image_ids(height: int, width: int, device: torch.device) -> Float[Tensor, "N 3"]:
    """(0, row, column) of every image token, row by row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1)
    return rearrange(ids, "h w coordinate -> (h w) coordinate").to(device, torch.float32)


def _check_plain(transformer: FluxTransformer2DModel) -> None:
    """Raise BackboneError for an acceleration that hands the taps something else than the blocks' outputs."""
    if transformer.is_cache_enabled:
        raise BackboneError(
            "a step cache is enabled, which returns stale block outputs; call disable_cache() first"
        )
    if getattr(transformer, "_parallel_config", None) is not None:
        raise BackboneError(
            "the transformer is sharded, so blocks see a part of the tokens; use one GPU a process"
        )
    if any(getattr(module, "fused_projections", False) for module in transformer.modules()):
        raise BackboneError("the QKV projections are fused; call unfuse_qkv_projections() first")
