"""Trains the autoencoder: L1 on pixels and their gradients, and a light pull of the latents to N(0, 1)."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmdiff_cache.flux_scenes.checkpoint import Progress, Stop
from mmdiff_cache.flux_scenes.corpus import Corpus, read_images, shrink, to_tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderRecipe:
    """How the autoencoder is trained. Most steps see crops of half the size, or pictures shrunk to it."""

    steps: int = 3000
    batch: int = 16
    whole_share: float = 0.25  # last share of the steps: whole pictures, a quarter of the batch
    learning_rate: float = 2e-3
    warmup: int = 100
    kl_weight: float = 1e-3  # on the mean over latent values
    gradient_weight: float = 0.5
    shards: int = 8  # of the corpus
    seed: int = 0
    checkpoint_minutes: float = 5.0


def train_autoencoder(
    model: AutoencoderKL, corpus: Corpus, recipe: AutoencoderRecipe, *, work: Path, device: torch.device
) -> None:
    """Train `model` in place, from the checkpoint in `work` on; then set its scaling and shift factors."""
    pictures = np.concatenate([read_images(corpus, n) for n in range(min(recipe.shards, corpus.shards))])
    cast(torch.nn.Module, model).to(device).train()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=1e-4, betas=(0.9, 0.98)
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    progress = Progress(modules={"vae": model}, optimisers=[optimiser], generator=generator)
    progress.load(work / "checkpoint")
    with Stop() as stop, (work / "metrics.jsonl").open("a") as metrics:
        saved = time.monotonic()
        for losses in _steps(model, optimiser, pictures, recipe, progress, device):
            if progress.step % 50 == 0:
                row = {"step": progress.step, "seconds": round(progress.seconds, 1)} | losses
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                log.info("autoencoder %s", row)
            if stop.asked or time.monotonic() - saved > 60 * recipe.checkpoint_minutes:
                progress.save(work / "checkpoint")
                saved = time.monotonic()
            if stop.asked:
                raise KeyboardInterrupt
    progress.save(work / "checkpoint")
    model.eval()
    set_latent_scale(model, pictures[:256], device)


def set_latent_scale(model: AutoencoderKL, pictures: NDArray[np.uint8], device: torch.device) -> None:
    """Choose shift_factor and scaling_factor such that (latent - shift) * scale has mean 0 and variance 1."""
    with torch.no_grad():
        parts = [
            model.encode(part.to(device), return_dict=False)[0].mode()
            for part in to_tensor(pictures).split(32)
        ]
    latents = torch.cat(parts).float()
    model.register_to_config(
        shift_factor=round(float(latents.mean()), 5), scaling_factor=round(1 / float(latents.std()), 5)
    )


@torch.no_grad()
def reconstruction_psnr(
    model: AutoencoderKL, pictures: NDArray[np.uint8], *, size: int, device: torch.device
) -> float:
    """Mean peak signal-to-noise ratio in dB of pictures passed through the autoencoder's mean latent."""
    originals = shrink(to_tensor(pictures), size).to(device)
    found = torch.cat([reconstruct(model, part) for part in originals.split(32)])
    errors = ((found.clamp(-1, 1) - originals) / 2).square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())


@torch.no_grad()
def reconstruct(model: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures [B 3 H W] in [-1, 1], encoded to their mean latent and decoded again."""
    latents = cast(Any, model).encode(pictures).latent_dist.mode()
    return cast(Any, model).decode(latents).sample


def _steps(
    model: AutoencoderKL,
    optimiser: torch.optim.AdamW,
    pictures: NDArray[np.uint8],
    recipe: AutoencoderRecipe,
    progress: Progress,
    device: torch.device,
) -> Iterator[dict[str, float]]:
    while progress.step < recipe.steps:
        start = time.monotonic()
        batch = _batch(pictures, recipe, progress).to(device).contiguous(memory_format=torch.channels_last)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * _rate(recipe, progress.step)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = cast(Any, model).encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=progress.generator).to(device)
            found = cast(Any, model).decode(posterior.mean + posterior.std * noise).sample
        pixel, gradient = _pixel_loss(found.float(), batch)
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = pixel + recipe.gradient_weight * gradient + recipe.kl_weight * kl
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        progress.step += 1
        progress.seconds += time.monotonic() - start
        yield {"l1": round(float(pixel), 5), "gradient": round(float(gradient), 5), "kl": round(float(kl), 3)}


def _batch(pictures: NDArray[np.uint8], recipe: AutoencoderRecipe, progress: Progress) -> Tensor:
    """Random crops, shrunk pictures, or whole ones; mirrored at random."""
    generator, half = progress.generator, pictures.shape[1] // 2
    whole = progress.step >= recipe.steps * (1 - recipe.whole_share)
    count = max(1, recipe.batch // 4) if whole else recipe.batch
    chosen = to_tensor(pictures[torch.randint(len(pictures), (count,), generator=generator).numpy()])
    top, left, kind, mirror = torch.rand(4, generator=generator).tolist()
    if mirror < 0.5:
        chosen = chosen.flip(-1)
    if whole:
        return chosen
    if kind < 0.3:
        return shrink(chosen, half)
    row, column = int(top * (half + 1)), int(left * (half + 1))
    return chosen[..., row : row + half, column : column + half]


def _pixel_loss(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    error = found - wanted
    across, down = error.diff(dim=-1).abs().mean(), error.diff(dim=-2).abs().mean()
    return F.l1_loss(found, wanted), across + down


def _rate(recipe: AutoencoderRecipe, step: int) -> float:
    """Linear warm-up, then a half cosine to 2 % of the peak."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return warm * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / recipe.steps)))
