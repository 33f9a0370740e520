"""The stages of making flux-scenes. Each can be run again: what is finished is kept, what was cut goes on.

    corpus -> autoencoder -> latents -> flow -> distill -> export -> judge -> adherence -> pictures

The working folder holds everything between them; only the last four write beside the package's weights.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from safetensors.torch import load_file

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.flux_scenes.adherence import Trial, evaluate_adherence
from mmdiff_cache.flux_scenes.autoencoder import AutoencoderRecipe, reconstruction_psnr, train_autoencoder
from mmdiff_cache.flux_scenes.build import Architecture, build_pipeline, load_pipeline, save_pipeline
from mmdiff_cache.flux_scenes.corpus import SHARD, Corpus, encode_corpus, read_images, render_corpus
from mmdiff_cache.flux_scenes.curves import draw_curves, read_metrics
from mmdiff_cache.flux_scenes.distill import DistillRecipe, train_guidance
from mmdiff_cache.flux_scenes.judge import JudgeRecipe, cached_truths, load_judge, save_judge, train_judge
from mmdiff_cache.flux_scenes.rectified_flow import FlowRecipe, Lesson, open_lesson, train_flow
from mmdiff_cache.flux_scenes.sample import draw, nearest, sheet
from mmdiff_cache.flux_scenes.velocity import of_pipeline
from mmdiff_cache.scenes import render_scene

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All choices of one run."""

    architecture: Architecture
    scenes: int  # of the corpus
    held_out: int  # validation scenes
    autoencoder: AutoencoderRecipe
    flow: FlowRecipe
    distill: DistillRecipe
    judge: JudgeRecipe
    trial: Trial
    size: int = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Workshop:
    """Where and on what a run is made."""

    work: Path
    device: torch.device
    workers: int = 1
    start: Path | None = None
    """A pipeline folder to go on from instead of from nothing."""
    autoencoder: Path | None = None
    """A pipeline folder whose autoencoder is taken over, where there is nothing to start from."""
    share: float = 1.0
    """Of the flow's steps: shorter trainings lie beside the whole one, on the same corpus and latents."""

    @property
    def training(self) -> Path:
        """Folder of what flow and distillation leave."""
        return self.work if self.share == 1 else self.work / f"share-{self.share:g}"

    def corpus(self, recipe: Recipe) -> Corpus:
        """The scenes to learn from."""
        return Corpus(folder=self.work / "corpus", split="pretrain", size=recipe.size, count=recipe.scenes)

    def held_out(self, recipe: Recipe) -> Corpus:
        """The scenes whose loss is watched."""
        return Corpus(folder=self.work / "validation", split="val", size=recipe.size, count=recipe.held_out)


def corpus_stage(recipe: Recipe, shop: Workshop) -> None:
    """Render the corpus and the validation scenes."""
    for corpus in (shop.corpus(recipe), shop.held_out(recipe)):
        render_corpus(corpus, workers=shop.workers)


def autoencoder_stage(recipe: Recipe, shop: Workshop) -> None:
    """Train the autoencoder, or take over the one to start from."""
    folder = shop.work / "vae"
    if (folder / "model").exists():
        log.info("the autoencoder is trained: %s", folder / "model")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (source := shop.start or shop.autoencoder) is not None:
        load_pipeline(source).vae.save_pretrained(folder / "model")
        return
    model: AutoencoderKL = build_pipeline(recipe.architecture).vae
    train_autoencoder(model, shop.corpus(recipe), recipe.autoencoder, work=folder, device=shop.device)
    pictures = read_images(shop.held_out(recipe), 0)[:64]
    scores = {
        size: reconstruction_psnr(model, pictures, size=size, device=shop.device)
        for size in (64, recipe.size)
    }
    log.info("autoencoder: PSNR in dB by size %s", scores)
    (folder / "psnr.json").write_text(json.dumps(scores) + "\n")
    model.save_pretrained(folder / "model")


def latents_stage(recipe: Recipe, shop: Workshop) -> None:
    """Encode both sets of scenes at every size that the flow is trained on."""
    model = current_pipeline(recipe, shop).vae.to(shop.device)
    for size in sorted({phase.size for phase in recipe.flow.phases} | {recipe.distill.size}):
        for corpus in (shop.held_out(recipe), shop.corpus(recipe)):
            encode_corpus(corpus, model, size=size, device=shop.device)


def flow_stage(recipe: Recipe, shop: Workshop) -> None:
    """Train transformer and text encoders, for the workshop's share of the steps."""
    pipeline = current_pipeline(recipe, shop)
    lessons = _lessons(recipe, shop, pipeline)
    train_flow(pipeline, *lessons, recipe.flow.shortened(shop.share), work=shop.training / "flow")


def distill_stage(recipe: Recipe, shop: Workshop) -> None:
    """Distil classifier-free guidance into the guidance embedding; anew if the flow was trained on."""
    folder = shop.training / "distill"
    if not _is_distilled(shop):
        shutil.rmtree(folder, ignore_errors=True)
    pipeline = trained_pipeline(recipe, shop, "flow")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "teacher.json").write_text(json.dumps({"step": _flow_step(shop)}) + "\n")
    lesson, _ = _lessons(recipe, shop, pipeline)
    train_guidance(pipeline, lesson, recipe.distill, work=folder)


def export_stage(recipe: Recipe, shop: Workshop, *, out: Path) -> Path:
    """Write the newest averaged weights as a pipeline folder; a README.md and pictures already there stay."""
    source = "distill" if _is_distilled(shop) else "flow"
    written = save_pipeline(trained_pipeline(recipe, shop, source), out)
    log.info("%s: %.1f MB from stage %s", out, written / 1e6, source)
    return out


def judge_stage(recipe: Recipe, shop: Workshop, *, judge: Path) -> None:
    """Train the judge, unless there is one: it stays fixed while generators change."""
    if judge.exists():
        log.info("the judge is trained: %s", judge)
        return
    truths = cached_truths(shop.work / "judge", "judge", recipe.judge.scenes)
    save_judge(train_judge(truths, recipe.judge, device=shop.device), judge)


def adherence_stage(recipe: Recipe, shop: Workshop, *, out: Path, judge: Path) -> dict[str, Any]:
    """Score the exported pipeline; the figures are written beside the weights."""
    pipeline = load_pipeline(out).to(shop.device)
    report = evaluate_adherence(pipeline, load_judge(judge).to(shop.device), recipe.trial, device=shop.device)
    report |= {"date": date.today().isoformat()} | describe_run(recipe, shop)
    (out / "adherence.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def pictures_stage(recipe: Recipe, shop: Workshop, *, out: Path) -> None:
    """Samples of seeds 0-15 above their nearest training renders, and the loss curves, for the model card."""
    scenes = [render_scene("test", index) for index in range(16)]
    pipeline = load_pipeline(out).to(shop.device)
    with torch.autocast(shop.device.type, torch.bfloat16):
        pictures = draw(
            pipeline, [scene.caption for scene in scenes], list(range(16)), steps=recipe.trial.steps
        )
    corpus = shop.corpus(recipe)
    found = nearest(pictures, corpus)
    closest = np.stack([read_images(corpus, number // SHARD)[number % SHARD] for number, _ in found])
    rows = [part for start in (0, 8) for part in (pictures[start : start + 8], closest[start : start + 8])]
    sheet(rows).save(out / "samples.jpg", quality=88)
    texts = [
        {"seed": seed, "prompt": scene.caption, "nearest": number, "grey_levels": distance}
        for seed, (scene, (number, distance)) in enumerate(zip(scenes, found, strict=True))
    ]
    (out / "samples.json").write_text(json.dumps(texts, indent=2) + "\n")
    draw_curves(read_metrics(shop.training / "flow" / "metrics.jsonl"), "train").save(
        out / "curves.png", optimize=True
    )


def current_pipeline(recipe: Recipe, shop: Workshop) -> FluxPipeline:
    """The pipeline before flow training: the start folder or untrained, with the autoencoder of this run."""
    pipeline = load_pipeline(shop.start) if shop.start else build_pipeline(recipe.architecture)
    if not (shop.work / "vae" / "model").exists():
        raise ConfigError(f"there is no trained autoencoder in {shop.work}; run --stage autoencoder first")
    pipeline.register_modules(vae=AutoencoderKL.from_pretrained(shop.work / "vae" / "model").eval())
    return pipeline


def trained_pipeline(recipe: Recipe, shop: Workshop, stage: str) -> FluxPipeline:
    """The pipeline with the averaged weights of the last checkpoint of stage 'flow' or 'distill'."""
    path = shop.training / stage / "checkpoint" / "weights.safetensors"
    if not path.exists():
        raise ConfigError(
            f"there is no checkpoint of stage {stage} in {shop.training}; run --stage {stage} first"
        )
    pipeline = current_pipeline(recipe, shop)
    prefix = "ema/module."
    weights = {
        key.removeprefix(prefix): value for key, value in load_file(path).items() if key.startswith(prefix)
    }
    of_pipeline(pipeline).load_state_dict(weights)
    return pipeline


def describe_run(recipe: Recipe, shop: Workshop) -> dict[str, Any]:
    """The choices, and what the checkpoints say of steps and hours; for the model card."""
    states = {
        stage: json.loads(path.read_text())
        for stage in ("vae", "flow", "distill")
        if (
            path := (shop.work if stage == "vae" else shop.training) / stage / "checkpoint" / "state.json"
        ).exists()
    }
    done = {
        stage: {"steps": state["step"], "hours": round(state["seconds"] / 3600, 2)}
        for stage, state in states.items()
    }
    return {"recipe": asdict(recipe), "done": done}


def _flow_step(shop: Workshop) -> int | None:
    """Step of the flow's checkpoint; None where there is none."""
    path = shop.training / "flow" / "checkpoint" / "state.json"
    return json.loads(path.read_text())["step"] if path.exists() else None


def _is_distilled(shop: Workshop) -> bool:
    """Whether there is a distilled checkpoint whose teacher is the flow's present checkpoint."""
    teacher = shop.training / "distill" / "teacher.json"
    if not teacher.exists() or not (shop.training / "distill" / "checkpoint").exists():
        return False
    return json.loads(teacher.read_text())["step"] == _flow_step(shop)


def _lessons(recipe: Recipe, shop: Workshop, pipeline: FluxPipeline) -> tuple[Lesson, Lesson]:
    corpora = (shop.corpus(recipe), shop.held_out(recipe))
    learnt, held_out = (open_lesson(pipeline, corpus, recipe.flow.prompts, shop.device) for corpus in corpora)
    return learnt, held_out
