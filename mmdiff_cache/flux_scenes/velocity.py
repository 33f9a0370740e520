"""Rectified flow: x_t = (1 - t) x_0 + t eps, and the model predicts eps - x_0. t = 1 is pure noise."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.t5.modeling_t5 import T5EncoderModel

from mmdiff_cache.flux_scenes.prompts import Tokens

FULL_GRID = (
    16  # tokens a side that position ids refer to, so that a layout learnt on small pictures carries over
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeMix:
    """How times are drawn: a small share close to 0, the rest half logit-normal, half uniform."""

    tiny: float = 0.06  # share drawn uniformly below tiny_limit: feature extraction reads t = 0.001
    tiny_limit: float = 0.02

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Times in (0, 1), [count]."""
        kind, uniform = torch.rand(2, count, generator=generator)
        normal = torch.sigmoid(torch.randn(count, generator=generator))
        times = torch.where(kind < 0.5 + self.tiny / 2, normal, uniform)
        return torch.where(kind < self.tiny, uniform * self.tiny_limit, times).clamp(1e-4, 1 - 1e-4)


class Velocity(nn.Module):
    """Transformer and both text encoders as one function from tokens and noised latents to velocities."""

    def __init__(
        self, transformer: FluxTransformer2DModel, words: T5EncoderModel, pooled: CLIPTextModel
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.words = words
        self.pooled = pooled

    def forward(self, noised: Tensor, times: Tensor, guidance: Tensor, tokens: Tokens) -> Tensor:
        """[B N P] packed latents at times [B] to velocities of the same shape."""
        text = cast(Tensor, self.words(tokens.words)[0])
        pooled = cast(Tensor, self.pooled(tokens.pooled).pooler_output)
        found: Any = self.transformer(
            hidden_states=noised,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=times,
            guidance=guidance,
            img_ids=position_ids(noised.shape[1]).to(noised.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=noised.device),
            return_dict=False,
        )
        return found[0].float()


def of_pipeline(pipeline: FluxPipeline) -> Velocity:
    """The trainable parts of a pipeline; they stay shared with it."""
    return Velocity(pipeline.transformer, pipeline.text_encoder_2, pipeline.text_encoder)


def position_ids(tokens: int) -> Tensor:
    """(0, row, column) of each token of a square picture, in units of the full grid, [N 3]."""
    side = round(tokens**0.5)
    ids = cast(Any, FluxPipeline)._prepare_latent_image_ids(1, side, side, torch.device("cpu"), torch.float32)
    step = FULL_GRID / side
    return torch.cat([ids[:, :1], (ids[:, 1:] + 0.5) * step - 0.5], 1)


def pack(latents: Tensor) -> Tensor:
    """Latents [B C h w] to tokens of 2 x 2 latents, [B N 4C]."""
    return cast(Any, FluxPipeline)._pack_latents(latents, *latents.shape)


def squared_errors(
    model: nn.Module, clean: Tensor, noise: Tensor, times: Tensor, guidance: Tensor, tokens: Tokens
) -> Tensor:
    """Mean squared error of each sample's predicted velocity, [B]."""
    t = times[:, None, None]
    predicted = model((1 - t) * clean + t * noise, times, guidance, tokens)
    return (predicted - (noise - clean)).square().mean((1, 2))
