"""FLUX.1 with random weights: the real classes at any number of blocks and heads, for timing alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from mmdiff_cache.backbones.flux import FluxBackbone
from mmdiff_cache.backbones.info import default_concept_blocks, default_layers
from mmdiff_cache.backbones.pipeline import choose_device
from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.backbones.text import TextSource

HEAD, WIDTH, POOLED = 128, 4096, 768
"""Channels of a head of FLUX.1, of a T5 vector, of the pooled CLIP vector."""


class RandomText(TextSource):
    """Random vectors of the right shape in the place of text encoders."""

    def __init__(self, length: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._length, self._device, self._dtype = length, device, dtype

    def word(self, word: str) -> torch.Tensor:
        return self._random(WIDTH)

    def _encode(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self._random(1, self._length, WIDTH), self._random(1, POOLED)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(self._device, self._dtype)


def random_flux(heads: int, blocks: tuple[int, int], device: str) -> FluxBackbone:
    """FLUX.1-dev's transformer and VAE with random weights: bfloat16 on a GPU, float32 on the CPU."""
    chosen = choose_device(device)
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # so that 12 B parameters are never made in float32
    try:
        with torch.device(chosen):
            transformer = FluxTransformer2DModel(
                num_layers=blocks[0],
                num_single_layers=blocks[1],
                num_attention_heads=heads,
                guidance_embeds=True,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    vae = cast(Any, AutoencoderKL)(  # its signature has tuples of one
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )
    pipeline = cast(Any, FluxPipeline)(  # its signature has no None
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.to(chosen),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    info = describe("flux-dev")
    shape = replace(
        info.architecture, double_blocks=blocks[0], single_blocks=blocks[1], channels=heads * HEAD
    )
    info = replace(
        info,
        name="FLUX.1 with random weights",
        architecture=shape,
        layers=default_layers(shape),
        concept_blocks=default_concept_blocks(shape),
    )
    text = RandomText(info.text_length, chosen, dtype)
    return FluxBackbone(info, pipeline, folder=Path(), text=text)
