"""Draws pictures with a pipeline, and lays pictures out as contact sheets."""

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmdiff_cache.flux_scenes.corpus import Corpus, read_images


def draw(
    pipeline: FluxPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    size: int = 128,
    steps: int = 28,
    guidance: float = 3.5,
    batch: int = 16,
) -> NDArray[np.uint8]:
    """One picture a prompt, uint8 [B H W 3]. The noise of a picture depends on its own seed alone."""
    pipeline.set_progress_bar_config(disable=True)
    found: list[NDArray[np.uint8]] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        result: Any = pipeline(
            part,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=pipeline.tokenizer_2.model_max_length,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]],
            output_type="np",
        )
        found.append((np.asarray(result.images) * 255).round().astype(np.uint8))
    return np.concatenate(found)


def nearest(pictures: NDArray[np.uint8], corpus: Corpus, *, side: int = 32) -> list[tuple[int, float]]:
    """For each picture the closest scene of the corpus (mirrored or not) and the RMS distance in grey levels.

    Distances are taken between pictures averaged down to side x side pixels.
    """
    queries = _small(pictures, side)
    best = torch.full((len(queries),), torch.inf)
    where = torch.zeros(len(queries), dtype=torch.long)
    for shard in range(corpus.shards):
        images = _small(read_images(corpus, shard), side)
        for candidates in (images, images.flip(2)):
            distances = torch.cdist(queries.flatten(1), candidates.flatten(1))
            values, rows = distances.min(1)
            closer = values < best
            best = torch.where(closer, values, best)
            where = torch.where(closer, rows + shard * len(images), where)
    rms = best / (queries[0].numel() ** 0.5)
    return [(int(number), round(float(distance), 2)) for number, distance in zip(where, rms, strict=True)]


def sheet(rows: list[NDArray[np.uint8]], *, gap: int = 2) -> Image.Image:
    """Rows of pictures ([B H W 3] each) on white."""
    height, width = rows[0].shape[1] + gap, rows[0].shape[2] + gap
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * height + gap, columns * width + gap, 3), 255, np.uint8)
    for line, row in enumerate(rows):
        for column, picture in enumerate(row):
            top, left = gap + line * height, gap + column * width
            canvas[top : top + height - gap, left : left + width - gap] = picture
    return Image.fromarray(canvas)


def _small(pictures: NDArray[np.uint8], side: int) -> Tensor:
    """[B H W 3] to float [B side side 3] by averages."""
    whole = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float()
    return torch.nn.functional.adaptive_avg_pool2d(whole, side).permute(0, 2, 3, 1)
