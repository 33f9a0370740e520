"""The whole way through the public names, at tiny size."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

import mmdiff_cache as mm
from mmdiff_cache.config import NoiseConfig
from mmdiff_cache.store.reader import Store, open_store

TIMESTEPS = (0.78, 0.52, 0.26, 0.001)
LAYERS = ("double.0", "single.1", "single.3")
BATCH, SEED = 2, 5


@pytest.fixture(scope="module")
def store(tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Scenes extracted in a few lines, as the README shows it."""
    config = mm.ExtractConfig(
        dataset="scenes",
        backbone=str(tiny_flux_folder),
        limit=4,
        resolution=64,
        layers=LAYERS,
        timesteps=TIMESTEPS,
        prompts="oracle",
        batch_size=BATCH,
        noise=NoiseConfig(seed=SEED),
        store=str(tmp_path_factory.mktemp("end-to-end") / "store"),
    )
    plan = mm.plan(config)
    assert "train 4, val 4, test 4" in str(plan)
    return mm.extract(plan)


def test_every_planned_sample_is_there_and_one_map_is_one_read(store: Store) -> None:
    assert store.samples_done == 12
    assert "train: 4 of 4 samples" in str(store)
    x = store["test"].read(sample=0, timestep=0.26, layer="single.1")
    assert x.shape == (8, 8, 32)
    assert x.dtype == np.float16
    assert set(store["train"].label_specs) == {"segmentation", "material", "saliency", "depth"}


def test_extracting_again_is_safe_and_quick(store: Store) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*.zarr/**/*")}
    again = mm.extract(mm.ExtractConfig.from_json({**store.manifest.config, "store": str(store.path)}))
    assert again.samples_done == 12
    assert {path: path.stat().st_mtime_ns for path in store.path.rglob("*.zarr/**/*")} == before


class PlainDiffusers:
    """A forward pass with diffusers and hooks alone; the noise rule is written out again."""

    def __init__(self, folder: Path) -> None:
        self.pipeline: Any = FluxPipeline.from_pretrained(folder)
        self.seen: dict[str, Tensor] = {}
        for address in LAYERS:
            kind, index = address.split(".")
            blocks = {"double": "transformer_blocks", "single": "single_transformer_blocks"}[kind]
            getattr(self.pipeline.transformer, blocks)[int(index)].register_forward_hook(
                lambda _module, _inputs, output, at=address: self.seen.__setitem__(at, output[1].clone())
            )

    @torch.inference_mode()
    def features(self, images: np.ndarray, ids: list[str], prompts: list[str]) -> np.ndarray:
        """float16 [B T L h w C] of uint8 images [B H W 3]; a picture's timesteps side by side."""
        vae, transformer = self.pipeline.vae, self.pipeline.transformer
        pixels = self.pipeline.image_processor.preprocess([Image.fromarray(image) for image in images])
        clean = vae.encode(pixels).latent_dist.mode()
        clean = (clean - vae.config.shift_factor) * vae.config.scaling_factor
        _, channels, height, width = clean.shape
        rows, texts, pooled = [], [], []
        for x0, sample_id, prompt in zip(clean, ids, prompts, strict=True):
            eps = self.noise(sample_id, (channels, height, width))
            tokens, vector, _ = self.pipeline.encode_prompt(prompt, prompt, max_sequence_length=12)
            for t in TIMESTEPS:
                rows.append((1 - torch.tensor(t)) * x0 + torch.tensor(t) * eps)
                texts.append(tokens)
                pooled.append(vector)
        transformer(
            hidden_states=FluxPipeline._pack_latents(torch.stack(rows), len(rows), channels, height, width),
            timestep=torch.tensor(TIMESTEPS).repeat(len(ids)),
            guidance=torch.full((len(rows),), 3.5),
            pooled_projections=torch.cat(pooled),
            encoder_hidden_states=torch.cat(texts),
            txt_ids=torch.zeros(12, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
        )
        maps = torch.stack([self.seen[address] for address in LAYERS], dim=1)  # [B*T L N C]
        shape = (len(ids), len(TIMESTEPS), len(LAYERS), height // 2, width // 2, maps.shape[-1])
        return maps.reshape(shape).to(torch.float16).numpy()

    @staticmethod
    def noise(sample_id: str, shape: tuple[int, ...]) -> Tensor:
        digest = hashlib.sha256(f"mmdiff-cache noise 1\0{SEED}\0{sample_id}\x000".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")))
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def test_cached_features_are_those_of_a_plain_diffusers_forward(store: Store, tiny_flux_folder: Path) -> None:
    """Bit for bit in the same forward shape; within rounding when every picture is passed alone."""
    split = open_store(store.path)["val"]
    plain = PlainDiffusers(tiny_flux_folder)
    for samples in ([0, 1], [2, 3]):
        ids, prompts = [split.ids[n] for n in samples], split.prompts(samples)
        assert all("." in prompt for prompt in prompts)
        cached = split.hidden_states(samples)
        direct = plain.features(split.images(samples), ids, prompts)
        np.testing.assert_array_equal(cached.view(np.uint16), direct.view(np.uint16))
        for row in range(BATCH):
            alone = plain.features(split.images([samples[row]]), ids[row : row + 1], prompts[row : row + 1])
            error = np.linalg.norm(cached[row].astype(float) - alone[0]) / np.linalg.norm(alone.astype(float))
            assert error < 1e-4  # one step of float16 here and there
