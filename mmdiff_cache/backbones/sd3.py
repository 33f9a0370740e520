"""Stable Diffusion 3 and 3.5 in diffusers' StableDiffusion3Pipeline format.

All blocks are joint ones, called `double` here as in FLUX. The last has no text output. The pipeline's image
tokens come first in its attention; the model is told the time as 0 to 1000, and takes the latent unpacked.
"""

from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor

from mmdiff_cache.backbones.base import BlockSlot, PromptEmbeddings
from mmdiff_cache.backbones.info import BackboneInfo, DTypeName, Quantisation
from mmdiff_cache.backbones.pipeline import PipelineBackbone, check_plain, load_pipeline, load_text_pipeline
from mmdiff_cache.backbones.text import EncoderText, TextSource

TIMES = 1000
"""The model's time of pure noise."""


class SD3Backbone(PipelineBackbone):
    """A StableDiffusion3Pipeline. Two CLIP encoders and T5 make one sequence of text, in this order."""

    @torch.inference_mode()
    def forward(
        self,
        noised: Float[Tensor, "B c H_f W_f"],
        t: Float[Tensor, " B"],
        prompts: PromptEmbeddings,
        guidance: float | None,
    ) -> Float[Tensor, "B c H_f W_f"]:
        check_plain(self._transformer)
        return self._transformer(
            hidden_states=noised.to(self.device, self.dtype),
            timestep=t.to(self.device) * TIMES,
            encoder_hidden_states=prompts.tokens,
            pooled_projections=prompts.pooled,
            return_dict=False,
        )[0]

    @property
    def contrast_in_one_pass(self) -> bool:
        return True

    def sampler_time(self, sigma: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return sigma  # forward multiplies by 1000 just as the scheduler does

    def _schedule(self, steps: int) -> dict[str, Any]:
        return {"num_inference_steps": steps}

    @torch.inference_mode()
    def concept_modulation(self, t: Float[Tensor, " B"], guidance: float | None) -> Float[Tensor, "B C"]:
        width = self._transformer.config.pooled_projection_dim
        pooled = torch.zeros(len(t), width, device=self.device, dtype=self.dtype)
        return cast(Tensor, self._transformer.time_text_embed(t.to(self.device) * TIMES, pooled))

    def _list_blocks(self) -> dict[str, BlockSlot]:
        container = self._transformer.transformer_blocks
        return {
            f"double.{index}": BlockSlot(block=block, container=container, index=index)
            for index, block in enumerate(container)
        }


class SD3Text(EncoderText):
    """Two CLIP encoders and T5."""

    @torch.inference_mode()
    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            prompt=prompt,
            prompt_2=prompt,
            prompt_3=prompt,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._text_length,
        )
        return cast(Tensor, tokens), cast(Tensor, pooled)

    def _place(self, word: str) -> slice:
        count = len(self._pipeline.tokenizer_3(word, add_special_tokens=False).input_ids)
        behind = self._pipeline.tokenizer_max_length  # the tokens of CLIP stand before those of T5
        return slice(behind, behind + count)


def load_sd3(
    info: BackboneInfo,
    folder: Path,
    *,
    device: str | torch.device,
    dtype: DTypeName,
    quantisation: Quantisation,
    text_length: int,
    text: TextSource | None,
) -> SD3Backbone:
    """Load a StableDiffusion3Pipeline folder; see `registry.load_backbone`. All blocks are loaded."""
    pipeline = load_pipeline(
        info,
        folder,
        StableDiffusion3Pipeline,
        SD3Transformer2DModel,
        device=device,
        dtype=dtype,
        quantisation=quantisation,
        with_text=text is None,
    )
    text = text or SD3Text(pipeline, device=pipeline.device, text_length=text_length)
    return SD3Backbone(info, pipeline, folder=folder, text=text)


def load_sd3_text(
    info: BackboneInfo, folder: Path, *, device: str | torch.device, dtype: DTypeName, text_length: int
) -> SD3Text:
    """Load the text encoders alone."""
    pipeline = load_text_pipeline(info, folder, StableDiffusion3Pipeline, device=device, dtype=dtype)
    return SD3Text(pipeline, device=pipeline.device, text_length=text_length)
