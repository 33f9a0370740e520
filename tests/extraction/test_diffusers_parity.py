"""The extractor against a forward pass written with diffusers and hooks alone, bit for bit."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

from mmdiff_cache.backbones.flux import FluxBackbone
from mmdiff_cache.config import NoiseConfig
from mmdiff_cache.extraction.extractor import Extractor
from mmdiff_cache.records import PreparedSample
from tests.tiny_flux import TEXT_LENGTH

TIMESTEPS = (0.78, 0.52, 0.26, 0.001)
PROMPTS = ("", "a red ball", "")
LAYERS = ("single.1", "single.3", "double.1")


def pictures() -> list[np.ndarray]:
    return [
        np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        for number in range(len(PROMPTS))
    ]


def written_rule_noise(sample_id: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.sha256(f"mmdiff-cache noise 1\0{seed}\0{sample_id}\x000".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


@torch.no_grad()
def plain_forward(folder: Path, seed: int) -> dict[str, Tensor]:
    """Features by block address, [B*T N C], a sample's timesteps side by side."""
    pipeline = FluxPipeline.from_pretrained(folder)
    pixels = pipeline.image_processor.preprocess([Image.fromarray(picture) for picture in pictures()])
    vae = pipeline.vae
    clean = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    _, channels, height, width = clean.shape
    pipeline.scheduler.set_timesteps(sigmas=list(TIMESTEPS))
    rows, embeddings, pooled = [], [], []
    for number, prompt in enumerate(PROMPTS):
        eps = written_rule_noise(f"picture-{number}", (channels, height, width), seed)
        encoded = pipeline.encode_prompt(prompt, max_sequence_length=TEXT_LENGTH)
        for step in pipeline.scheduler.timesteps:
            rows.append(pipeline.scheduler.scale_noise(clean[number : number + 1], step[None], eps[None]))
            embeddings.append(encoded[0])
            pooled.append(encoded[1])
    noised = torch.cat(rows)
    seen: dict[str, Tensor] = {}
    for address in LAYERS:
        kind, index = address.split(".")
        blocks = {"double": "transformer_blocks", "single": "single_transformer_blocks"}[kind]
        getattr(pipeline.transformer, blocks)[int(index)].register_forward_hook(
            lambda _module, _inputs, output, at=address: seen.__setitem__(at, output[1].clone())
        )
    pipeline.transformer(
        hidden_states=pipeline._pack_latents(noised, len(noised), channels, height, width),
        timestep=torch.tensor(TIMESTEPS).repeat(len(PROMPTS)),
        guidance=torch.full((len(noised),), 3.5),
        pooled_projections=torch.cat(pooled),
        encoder_hidden_states=torch.cat(embeddings),
        txt_ids=torch.zeros(TEXT_LENGTH, 3),
        img_ids=pipeline._prepare_latent_image_ids(1, height // 2, width // 2, clean.device, clean.dtype),
    )
    return seen


@pytest.mark.parametrize("concepts", [{}, {"depth": ("near", "far", "sky")}], ids=["plain", "with concepts"])
def test_features_equal_those_of_a_plain_diffusers_forward(
    concepts: dict[str, tuple[str, ...]], tiny_flux_folder: Path, tiny_backbone: FluxBackbone
) -> None:
    extractor = Extractor(
        tiny_backbone,
        layers=LAYERS,
        timesteps=TIMESTEPS,
        vocabularies=concepts,
        noise=NoiseConfig(seed=11),
        guidance=3.5,
    )
    samples = [
        PreparedSample(
            sample_id=f"picture-{number}",
            image=image,
            prompt=prompt,
            labels={},
            original_labels={},
            content_hash="",
        )
        for number, (image, prompt) in enumerate(zip(pictures(), PROMPTS, strict=True))
    ]
    captured, features = extractor.capture(samples), extractor(samples)
    plain = plain_forward(tiny_flux_folder, seed=11)
    for number, address in enumerate(LAYERS):
        expected = plain[address].reshape(3, 4, 4, 4, 32)
        assert torch.equal(captured.hidden_states[:, :, number], expected), address
        stored = expected.clamp(-65504, 65504).half().numpy()
        np.testing.assert_array_equal(features.hidden_states[:, 0, :, number], stored)
