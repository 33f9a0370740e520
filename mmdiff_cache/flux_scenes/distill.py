"""Guidance distillation, as in FLUX.1-dev: one pass learns what two passes of the teacher give."""

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from mmdiff_cache.flux_scenes.checkpoint import Progress
from mmdiff_cache.flux_scenes.prompts import PromptMix
from mmdiff_cache.flux_scenes.rectified_flow import (
    FlowRecipe,
    Lesson,
    Phase,
    averaged,
    build_optimisers,
    prepare,
    run_steps,
)
from mmdiff_cache.flux_scenes.velocity import TimeMix, Velocity, of_pipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillRecipe:
    """How guidance is distilled; `guidance` is the range of values drawn."""

    steps: int
    batch: int
    size: int = 128
    guidance: tuple[float, float] = (1.0, 5.0)
    learning_rate: float = 3e-4
    ema: float = 0.995
    prompts: PromptMix = field(default_factory=PromptMix)
    times: TimeMix = field(default_factory=TimeMix)
    compiled: bool = True
    seed: int = 1

    def as_flow(self) -> FlowRecipe:
        """The same choices in the words of the training loop."""
        return FlowRecipe(
            phases=(Phase(size=self.size, steps=self.steps, batch=self.batch),),
            learning_rate=self.learning_rate,
            muon=False,
            ema=self.ema,
            warmup=20,
            decay=0.5,
            guidance=self.guidance,
            prompts=self.prompts,
            times=self.times,
            compiled=self.compiled,
            validate_every=self.steps + 1,
            seed=self.seed,
        )


def train_guidance(
    pipeline: FluxPipeline, lesson: Lesson, recipe: DistillRecipe, *, work: Path
) -> AveragedModel:
    """Train the pipeline in place towards its own guided predictions; the teacher is what it was before."""
    model = of_pipeline(pipeline).to(lesson.device)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    model.train()
    flow = recipe.as_flow()
    average = averaged(model, flow.ema)
    optimisers = build_optimisers(model, flow)
    prepare(model, compiled=flow.compiled)
    generator = torch.Generator().manual_seed(flow.seed)
    progress = Progress(modules={"model": model, "ema": average}, optimisers=optimisers, generator=generator)
    progress.load(work / "checkpoint")

    def loss(_step: int) -> tuple[Tensor, Tensor]:
        return guidance_loss(model, teacher, lesson, recipe, generator)

    run_steps(model, average, progress, flow, loss, dict, work=work)
    return average


def guidance_loss(
    model: Velocity, teacher: Velocity, lesson: Lesson, recipe: DistillRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Squared distance of each sample to the teacher's uncond + g (cond - uncond), and times: [B], [B]."""
    batch, device = recipe.batch, lesson.device
    scenes = torch.randint(len(lesson.latents(recipe.size)), (batch,), generator=generator)
    clean = lesson.clean(recipe.size, scenes, torch.randint(2, (batch,), generator=generator))
    tokens = lesson.bank.draw(scenes, generator).to(device)
    nothing = lesson.bank.empty(batch).to(device)
    times = recipe.times.draw(batch, generator).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    low, high = recipe.guidance
    guidance = (low + (high - low) * torch.rand(batch, generator=generator)).to(device)
    t = times[:, None, None]
    noised = (1 - t) * clean + t * noise
    ones = torch.ones_like(guidance)
    with torch.autocast(device.type, torch.bfloat16):
        with torch.no_grad():
            with_prompt = teacher(noised, times, ones, tokens)
            without = teacher(noised, times, ones, nothing)
        wanted = without + guidance[:, None, None] * (with_prompt - without)
        found = model(noised, times, guidance, tokens)
    return (found - wanted).square().mean((1, 2)), times
