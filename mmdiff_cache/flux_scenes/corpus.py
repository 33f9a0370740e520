"""The scenes that flux-scenes learns from: rendered once into a working folder, encoded once.

A shard is a run of SHARD consecutive scenes: `images-00003.npy` (uint8 [scene H W 3]) with
`captions-00003.json`, and after encoding `latents-128-00003.npy` (float16 [scene flip C h w]; flip 1 is the
mirrored picture: no caption speaks of left or right). Files appear whole, so an interrupted run goes on where
it stopped.
"""

import json
import logging
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmdiff_cache.errors import DataError
from mmdiff_cache.scenes import render_scene

log = logging.getLogger(__name__)

SHARD = 512  # scenes


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """What can be said of one scene."""

    caption: str
    scene: str  # ground and time alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A folder of rendered scenes of one split at one size in pixels; `count` rounds up to whole shards."""

    folder: Path
    split: str = "pretrain"
    size: int = 128
    count: int = 16384

    @property
    def shards(self) -> int:
        """Number of shards that hold `count` scenes."""
        return -(-self.count // SHARD)


def render_corpus(corpus: Corpus, *, workers: int) -> None:
    """Render every shard that is not there yet."""
    corpus.folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(corpus.shards) if not _captions_path(corpus, number).exists()]
    log.info("rendering %d of %d shards of split %s", len(missing), corpus.shards, corpus.split)
    if workers <= 1:
        for number in missing:
            _render_shard(corpus, number)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for number in pool.map(_render_shard, [corpus] * len(missing), missing):
            log.info("rendered shard %d", number)


def read_images(corpus: Corpus, number: int) -> NDArray[np.uint8]:
    """Pictures of one shard, [scene H W 3], mapped from disk. DataError if it was not rendered."""
    if not _captions_path(corpus, number).exists():
        raise DataError(
            f"shard {number} of {corpus.split} is not in {corpus.folder}; run the corpus stage first"
        )
    return np.load(_images_path(corpus, number), mmap_mode="r")


def read_prompts(corpus: Corpus) -> list[Prompts]:
    """Captions of all scenes, in order."""
    texts = (json.loads(_captions_path(corpus, number).read_text()) for number in range(corpus.shards))
    return [Prompts(**entry) for shard in texts for entry in shard]


def encode_corpus(corpus: Corpus, autoencoder: AutoencoderKL, *, size: int, device: torch.device) -> None:
    """Write the latents (means, not scaled) of every scene shrunk to `size` pixels, mirrored too."""
    for number in range(corpus.shards):
        path = _latents_path(corpus, size, number)
        if path.exists():
            continue
        pictures = to_tensor(read_images(corpus, number))
        latents = [encode(autoencoder, shrink(part, size).to(device)).cpu() for part in pictures.split(64)]
        _save(path, torch.cat(latents).half().numpy())


def read_latents(corpus: Corpus, *, size: int) -> Tensor:
    """Latents of all scenes, float16 [scene flip C h w]."""
    return torch.cat(
        [torch.from_numpy(np.load(_latents_path(corpus, size, n))) for n in range(corpus.shards)]
    )


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Mean latents of pictures and of their mirror images: [B 3 H W] in [-1, 1] to [B 2 C h w]."""
    both = torch.stack([pictures, pictures.flip(-1)], 1).flatten(0, 1)
    latents = autoencoder.encode(both, return_dict=False)[0].mode()
    return latents.unflatten(0, (-1, 2))


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """uint8 [B H W 3] to float32 [B 3 H W] in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def shrink(pictures: Tensor, size: int) -> Tensor:
    """Average whole blocks of pixels until the pictures are `size` pixels wide."""
    factor = pictures.shape[-1] // size
    return pictures if factor == 1 else F.avg_pool2d(pictures, factor)


def _render_shard(corpus: Corpus, number: int) -> int:
    scenes = [render_scene(corpus.split, number * SHARD + index, corpus.size) for index in range(SHARD)]
    _save(_images_path(corpus, number), np.stack([one.image for one in scenes]))
    prompts = [{"caption": one.caption, "scene": one.prompt_scene} for one in scenes]
    _save(_captions_path(corpus, number), json.dumps(prompts))
    return number


def _save(path: Path, content: NDArray[Any] | str) -> None:
    """Write beside the target, then rename: a file with its final name is complete."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    with partial.open("wb") as file:
        if isinstance(content, str):
            file.write(content.encode())
        else:
            np.save(file, content)
    partial.rename(path)


def _images_path(corpus: Corpus, number: int) -> Path:
    return corpus.folder / f"images-{number:05d}.npy"


def _captions_path(corpus: Corpus, number: int) -> Path:
    return corpus.folder / f"captions-{number:05d}.json"


def _latents_path(corpus: Corpus, size: int, number: int) -> Path:
    return corpus.folder / f"latents-{size}-{number:05d}.npy"
