"""Prompt adherence: how much of what held-out prompts claim is in the pictures drawn for them.

The same prompts are scored on generated pictures, on the real renders, on the real renders passed through the
autoencoder (what a perfect generator could reach), and each of them against other scenes' prompts (chance).
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from numpy.typing import NDArray

from mmdiff_cache.flux_scenes.autoencoder import reconstruct
from mmdiff_cache.flux_scenes.corpus import to_tensor
from mmdiff_cache.flux_scenes.judge import Judge, read
from mmdiff_cache.flux_scenes.sample import draw
from mmdiff_cache.flux_scenes.verdict import (
    ATTRIBUTES,
    Content,
    chance,
    claimed,
    contents,
    has_held_out_pair,
    headline,
    is_plain,
    score,
    shift,
)
from mmdiff_cache.scenes import Scene, render_scene

log = logging.getLogger(__name__)

REAL_BAR = 0.95  # the judge counts where it reaches this on real renders


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What is asked of the generator."""

    prompts: int = 500
    split: str = "test"
    steps: int = 28
    guidance: float = 3.5
    real: int = 500  # renders on which the judge itself is checked


def plain_scenes(split: str, count: int) -> list[Scene]:
    """The first scenes of a split whose objects are all plain to see."""
    found: list[Scene] = []
    index = 0
    while len(found) < count:
        scene = render_scene(split, index)
        index += 1
        if is_plain(scene):
            found.append(scene)
    return found


def evaluate_adherence(
    pipeline: FluxPipeline, judge: Judge, trial: Trial, *, device: torch.device
) -> dict[str, Any]:
    """All scores, over all prompts and over those with a combination held out of pretraining."""
    scenes = plain_scenes(trial.split, max(trial.real, trial.prompts))
    asked = scenes[: trial.prompts]
    with torch.autocast(device.type, torch.bfloat16):
        pictures = draw(
            pipeline,
            [scene.caption for scene in asked],
            list(range(len(asked))),
            steps=trial.steps,
            guidance=trial.guidance,
        )
    renders = np.stack([scene.image for scene in scenes])
    claims = [claimed(scene) for scene in scenes]
    shown = {
        "generated": _contents(judge, pictures, device),
        "real": _contents(judge, renders, device),
        "real through the autoencoder": _contents(
            judge, _through(pipeline, renders[: len(asked)], device), device
        ),
    }
    report: dict[str, Any] = {"trial": asdict(trial), "all": _scores(claims, shown)}
    held_out = [number for number, claim in enumerate(claims) if has_held_out_pair(claim)]
    if held_out:
        picked = {name: [found[n] for n in held_out if n < len(found)] for name, found in shown.items()}
        report["held-out combinations"] = _scores([claims[n] for n in held_out], picked)
    report["chance"] = _rounded(chance(claims[: len(asked)]))
    real = report["all"]["real"]
    report["judge passes"] = {name: real[name] >= REAL_BAR for name in (*ATTRIBUTES, "colours")}
    return report


def _scores(claims: Sequence[Content], shown: dict[str, list[Content]]) -> dict[str, Any]:
    """Rows by kind of picture; `n` counts pictures. The headline has what the judge reads well enough."""
    rows: dict[str, Any] = {}
    for name, found in shown.items():
        own = claims[: len(found)]
        rows[name] = {"n": len(found)} | _rounded(score(own, found))
        rows[f"{name}, shuffled prompts"] = {"n": len(found)} | _rounded(score(shift(own), found))
    shares = headline(rows["generated"], rows["real, shuffled prompts"], rows["real"])
    rows["headline"] = _rounded(
        {name: share for name, share in shares.items() if rows["real"][name] >= REAL_BAR}
    )
    return rows


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def _contents(judge: Judge, pictures: NDArray[np.uint8], device: torch.device) -> list[Content]:
    return contents(read(judge, pictures, device=device))


@torch.no_grad()
def _through(pipeline: FluxPipeline, pictures: NDArray[np.uint8], device: torch.device) -> NDArray[np.uint8]:
    """Pictures encoded and decoded again."""
    model = pipeline.vae.to(device)
    parts = [reconstruct(model, part.to(device)) for part in to_tensor(pictures).split(32)]
    levels = ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().byte()
    return levels.permute(0, 2, 3, 1).cpu().numpy()
