"""FLUX.1 and its relatives in diffusers' FluxPipeline format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mmdiff_cache.backbones.base import BlockSlot, PromptEmbeddings
from mmdiff_cache.backbones.info import PATCH, BackboneInfo, DTypeName, Quantisation
from mmdiff_cache.backbones.pipeline import PipelineBackbone, check_plain, load_pipeline, load_text_pipeline
from mmdiff_cache.backbones.text import EncoderText, TextSource
from mmdiff_cache.errors import ConfigError


class FluxBackbone(PipelineBackbone):
    """A FluxPipeline whose transformer may lack its last single blocks."""

    @torch.inference_mode()
    def forward(
        self,
        noised: Float[Tensor, "B c H_f W_f"],
        t: Float[Tensor, " B"],
        prompts: PromptEmbeddings,
        guidance: float | None,
    ) -> Float[Tensor, "B c H_f W_f"]:
        check_plain(self._transformer)
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

    @property
    def contrast_in_one_pass(self) -> bool:
        return False

    def sampler_time(self, sigma: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return (sigma * 1000).to(self.dtype) / 1000

    def _schedule(self, steps: int) -> dict[str, Any]:
        return {"sigmas": list(np.linspace(1.0, 1 / steps, steps))}

    @torch.inference_mode()
    def concept_modulation(self, t: Float[Tensor, " B"], guidance: float | None) -> Float[Tensor, "B C"]:
        config = self._transformer.config
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

    def _list_blocks(self) -> dict[str, BlockSlot]:
        return {
            f"{kind}.{index}": BlockSlot(block=block, container=container, index=index)
            for kind, container in (
                ("double", self._transformer.transformer_blocks),
                ("single", self._transformer.single_transformer_blocks),
            )
            for index, block in enumerate(container)
        }


class FluxText(EncoderText):
    """T5 for the tokens, CLIP for the pooled vector."""

    @torch.inference_mode()
    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        tokens, pooled, _ = self._pipeline.encode_prompt(
            prompt=prompt, prompt_2=prompt, device=self.device, max_sequence_length=self._text_length
        )
        return cast(Tensor, tokens), cast(Tensor, pooled)

    def _place(self, word: str) -> slice:
        return slice(0, len(self._pipeline.tokenizer_2(word, add_special_tokens=False).input_ids))


def load_flux(
    info: BackboneInfo,
    folder: Path,
    *,
    layers: Sequence[str] | None,
    device: str | torch.device,
    dtype: DTypeName,
    quantisation: Quantisation,
    text_length: int,
    text: TextSource | None,
) -> FluxBackbone:
    """Load a FluxPipeline folder; see `registry.load_backbone`."""
    depth = _single_blocks_needed(info, layers)
    pipeline = load_pipeline(
        info,
        folder,
        FluxPipeline,
        FluxTransformer2DModel,
        device=device,
        dtype=dtype,
        quantisation=quantisation,
        with_text=text is None,
        num_single_layers=depth,
    )
    text = text or FluxText(pipeline, device=pipeline.device, text_length=text_length)
    return FluxBackbone(info, pipeline, folder=folder, text=text)


def load_flux_text(
    info: BackboneInfo, folder: Path, *, device: str | torch.device, dtype: DTypeName, text_length: int
) -> FluxText:
    """Load the text encoders alone."""
    pipeline = load_text_pipeline(info, folder, FluxPipeline, device=device, dtype=dtype)
    return FluxText(pipeline, device=pipeline.device, text_length=text_length)


def _single_blocks_needed(info: BackboneInfo, layers: Sequence[str] | None) -> int:
    if layers is None:
        return info.architecture.single_blocks
    return 1 + max(
        (int(layer.removeprefix("single.")) for layer in layers if layer.startswith("single.")), default=-1
    )


def _image_ids(height: int, width: int, device: torch.device) -> Float[Tensor, "N 3"]:
    """(0, row, column) of every image token, row by row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1)
    return rearrange(ids, "h w coordinate -> (h w) coordinate").to(device, torch.float32)
