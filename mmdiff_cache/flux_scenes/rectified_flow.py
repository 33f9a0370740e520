"""Trains the transformer with both text encoders by rectified flow: small pictures first, full size later.

Everything that changes is in a checkpoint; a run that was stopped goes on with the same numbers.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mmdiff_cache.flux_scenes.attention import TrainingAttnProcessor
from mmdiff_cache.flux_scenes.checkpoint import Progress, Stop
from mmdiff_cache.flux_scenes.corpus import Corpus, read_latents, read_prompts
from mmdiff_cache.flux_scenes.prompts import PromptBank, PromptMix
from mmdiff_cache.flux_scenes.velocity import TimeMix, Velocity, of_pipeline, pack, squared_errors

log = logging.getLogger(__name__)

TIME_EDGES = (0.0, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # bins of the reported losses


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A run of steps on pictures of one size in pixels."""

    size: int
    steps: int
    batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowRecipe:
    """How the flow is trained. The rate warms up, stays, and falls linearly over the last `decay` share."""

    phases: tuple[Phase, ...]
    learning_rate: float = 1e-3
    muon: bool = True  # orthogonalised momentum for the blocks' matrices, AdamW for everything else
    weight_decay: float = 0.01
    warmup: int = 100
    decay: float = 0.2
    ema: float = 0.999
    guidance: tuple[float, float] = (1.0, 5.0)  # drawn at random and of no meaning until it is distilled
    prompts: PromptMix = field(default_factory=PromptMix)
    times: TimeMix = field(default_factory=TimeMix)
    compiled: bool = True
    validate_every: int = 300
    checkpoint_minutes: float = 10.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def shortened(self, share: float) -> "FlowRecipe":
        """The same with this share of every phase's steps; the rate falls at the end of these."""
        phases = (replace(one, steps=max(1, round(one.steps * share))) for one in self.phases)
        return replace(self, phases=tuple(phases))

    def phase(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]

    def rate(self, step: int) -> float:
        """Learning rate of a step, as a share of the peak."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, max(0.02, left))


@dataclass(kw_only=True)
class Lesson:
    """What a step needs besides the recipe: prompts, latents at each size, the device."""

    bank: PromptBank
    read: Callable[[int], Tensor]  # by picture size: float16 [scene flip C h w], not scaled
    shift: float
    scale: float
    device: torch.device
    _latents: dict[int, Tensor] = field(default_factory=dict)

    def latents(self, size: int) -> Tensor:
        """All latents of one size; read when first asked for, the sizes before are let go."""
        if size not in self._latents:
            self._latents = {size: self.read(size)}
        return self._latents[size]

    def clean(self, size: int, scenes: Tensor, flips: Tensor) -> Tensor:
        """Scaled and packed latents of some scenes, [B N 4C]."""
        return pack((self.latents(size)[scenes, flips].float() - self.shift) * self.scale).to(self.device)


def open_lesson(pipeline: FluxPipeline, corpus: Corpus, mix: PromptMix, device: torch.device) -> Lesson:
    """Captions and latents of a corpus; it must have been encoded by the pipeline's autoencoder."""
    config: Any = pipeline.vae.config
    return Lesson(
        bank=PromptBank(pipeline, read_prompts(corpus), mix),
        read=lambda size: read_latents(corpus, size=size),
        shift=config.shift_factor,
        scale=config.scaling_factor,
        device=device,
    )


def train_flow(
    pipeline: FluxPipeline, lesson: Lesson, validation: Lesson, recipe: FlowRecipe, *, work: Path
) -> AveragedModel:
    """Train transformer and text encoders in place, from the checkpoint in `work` on; returns the average."""
    model = of_pipeline(pipeline).to(lesson.device).train()
    average = averaged(model, recipe.ema)
    optimisers = build_optimisers(model, recipe)
    prepare(model, compiled=recipe.compiled)
    generator = torch.Generator().manual_seed(recipe.seed)
    progress = Progress(modules={"model": model, "ema": average}, optimisers=optimisers, generator=generator)
    progress.load(work / "checkpoint")

    def loss(step: int) -> tuple[Tensor, Tensor]:
        return flow_loss(model, lesson, recipe, recipe.phase(step), generator)

    def validate() -> dict[str, float]:
        return validation_losses(average, validation, recipe.phase(progress.step - 1).size)

    run_steps(model, average, progress, recipe, loss, validate, work=work)
    return average


def flow_loss(
    model: nn.Module, lesson: Lesson, recipe: FlowRecipe, phase: Phase, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Squared error of each sample of one random batch, and the samples' times: [B], [B]."""
    latents = lesson.latents(phase.size)
    scenes = torch.randint(len(latents), (phase.batch,), generator=generator)
    flips = torch.randint(2, (phase.batch,), generator=generator)
    clean = lesson.clean(phase.size, scenes, flips)
    tokens = lesson.bank.draw(scenes, generator).to(lesson.device)
    times = recipe.times.draw(phase.batch, generator).to(lesson.device)
    noise = torch.randn(clean.shape, generator=generator).to(lesson.device)
    low, high = recipe.guidance
    guidance = (low + (high - low) * torch.rand(phase.batch, generator=generator)).to(lesson.device)
    with torch.autocast(lesson.device.type, torch.bfloat16):
        return squared_errors(model, clean, noise, times, guidance, tokens), times


def run_steps(
    model: Velocity,
    average: AveragedModel,
    progress: Progress,
    recipe: FlowRecipe,
    loss: Callable[[int], tuple[Tensor, Tensor]],
    validate: Callable[[], dict[str, float]],
    *,
    work: Path,
) -> None:
    """Optimise until the last step, with logs and checkpoints. KeyboardInterrupt once a signal was obeyed."""
    work.mkdir(parents=True, exist_ok=True)
    recent: list[tuple[Tensor, Tensor]] = []
    with Stop() as stop, (work / "metrics.jsonl").open("a") as metrics:
        saved = time.monotonic()
        for errors, times in _steps(model, average, progress, recipe, loss):
            recent.append((errors, times))
            if progress.step % 50 == 0 or progress.step == recipe.steps:
                row: dict[str, Any] = {"step": progress.step, "seconds": round(progress.seconds, 1)}
                row |= {"size": recipe.phase(progress.step - 1).size, "train": by_time(recent)}
                if progress.step % recipe.validate_every == 0 or progress.step == recipe.steps:
                    row["validation"] = validate()
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                log.info("%s", row)
                recent.clear()
            if stop.asked or time.monotonic() - saved > 60 * recipe.checkpoint_minutes:
                progress.save(work / "checkpoint")
                saved = time.monotonic()
            if stop.asked:
                raise KeyboardInterrupt
    progress.save(work / "checkpoint")


def _steps(
    model: Velocity,
    average: AveragedModel,
    progress: Progress,
    recipe: FlowRecipe,
    loss: Callable[[int], tuple[Tensor, Tensor]],
) -> Iterator[tuple[Tensor, Tensor]]:
    while progress.step < recipe.steps:
        start = time.monotonic()
        for optimiser in progress.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * recipe.rate(progress.step)
        errors, times = loss(progress.step)
        errors.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in progress.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        average.update_parameters(model)
        progress.step += 1
        progress.seconds += time.monotonic() - start
        yield errors.detach().cpu(), times.cpu()


@torch.no_grad()
def validation_losses(
    model: nn.Module, lesson: Lesson, size: int, *, batches: int = 4, batch: int = 28
) -> dict[str, float]:
    """Loss by time on fixed held-out scenes, noise and times; guidance 1, full captions."""
    generator = torch.Generator().manual_seed(1)
    bins = torch.tensor(TIME_EDGES)
    found: list[tuple[Tensor, Tensor]] = []
    for number in range(batches):
        scenes = (torch.arange(batch) + number * batch) % len(lesson.latents(size))
        clean = lesson.clean(size, scenes, torch.zeros_like(scenes))
        which = torch.arange(batch) % (len(bins) - 1)
        times = bins[which] + (bins[which + 1] - bins[which]) * torch.rand(batch, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        tokens = lesson.bank.captions(scenes).to(lesson.device)
        ones = torch.ones(batch, device=lesson.device)
        with torch.autocast(lesson.device.type, torch.bfloat16):
            errors = squared_errors(
                model, clean, noise.to(lesson.device), times.to(lesson.device), ones, tokens
            )
        found.append((errors.cpu(), times))
    return by_time(found)


def by_time(found: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean error in each bin of times, and over all samples."""
    errors, times = (torch.cat(parts) for parts in zip(*found, strict=True))
    means = {"all": round(float(errors.mean()), 5)}
    for low, high in pairwise(TIME_EDGES):
        inside = (times >= low) & (times < high)
        if inside.any():
            means[f"{low:g}-{high:g}"] = round(float(errors[inside].mean()), 5)
    return means


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights, with the warm-up min(decay, (1 + n) / (10 + n))."""

    @torch.no_grad()
    def update(averages: Any, current: Any, count: Any) -> None:
        n = float(count)
        cast(Any, torch)._foreach_lerp_(averages, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=update)


def build_optimisers(model: Velocity, recipe: FlowRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks (not the modulations), AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        inside = "transformer_blocks" in name and weight.ndim == 2 and ".linear." not in name
        (matrices if inside and recipe.muon else others).append(weight)
    rate, decay = recipe.learning_rate, recipe.weight_decay
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    ]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return found


def prepare(model: Velocity, *, compiled: bool) -> None:
    """Compile the blocks, on a CPU with the attention made for it; the weights keep their names."""
    if compiled and model.transformer.device.type == "cpu":
        model.transformer.set_attn_processor(TrainingAttnProcessor())  # type: ignore[arg-type]
    if compiled:
        model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
