"""The stages on a tiny recipe: every one runs, and training the flow on asks for a new distillation."""

import dataclasses
from pathlib import Path

import pytest
import torch

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.flux_scenes.adherence import Trial
from mmdiff_cache.flux_scenes.autoencoder import AutoencoderRecipe
from mmdiff_cache.flux_scenes.build import load_pipeline
from mmdiff_cache.flux_scenes.distill import DistillRecipe
from mmdiff_cache.flux_scenes.judge import JudgeRecipe
from mmdiff_cache.flux_scenes.rectified_flow import FlowRecipe, Phase
from mmdiff_cache.flux_scenes.stages import (
    Recipe,
    Workshop,
    adherence_stage,
    autoencoder_stage,
    corpus_stage,
    describe_run,
    distill_stage,
    export_stage,
    flow_stage,
    judge_stage,
    latents_stage,
    trained_pipeline,
)
from tests.flux_scenes.conftest import TINY

pytestmark = pytest.mark.filterwarnings("ignore")


def tiny(steps: int) -> Recipe:
    flow = FlowRecipe(phases=(Phase(size=16, steps=steps, batch=2),), compiled=False, warmup=1)
    return Recipe(
        architecture=TINY,
        scenes=6,
        held_out=6,
        autoencoder=AutoencoderRecipe(steps=2, batch=4, warmup=1),
        flow=flow,
        distill=DistillRecipe(steps=1, batch=2, size=16, compiled=False),
        judge=JudgeRecipe(scenes=2, steps=1, batch=1),
        trial=Trial(prompts=2, real=2),
        size=64,
    )


def test_stages_run_in_order_and_start_from_a_folder(tmp_path: Path) -> None:
    shop, recipe = Workshop(work=tmp_path / "work", device=torch.device("cpu")), tiny(1)
    with pytest.raises(ConfigError, match="--stage autoencoder"):
        flow_stage(recipe, shop)
    for stage in (corpus_stage, autoencoder_stage, latents_stage, flow_stage, distill_stage):
        stage(recipe, shop)
    export_stage(recipe, shop, out=tmp_path / "flux")
    done = describe_run(recipe, shop)["done"]
    assert done["flow"]["steps"] == 1
    exported = load_pipeline(tmp_path / "flux").transformer.x_embedder.weight
    distilled = trained_pipeline(recipe, shop, "distill").transformer.x_embedder.weight
    torch.testing.assert_close(exported, distilled, atol=1e-3, rtol=1e-2)

    flow_stage(tiny(2), shop)  # two steps in all: the distilled weights are now of an older teacher
    export_stage(recipe, shop, out=tmp_path / "flux")
    newer = trained_pipeline(recipe, shop, "flow").transformer.x_embedder.weight
    torch.testing.assert_close(
        load_pipeline(tmp_path / "flux").transformer.x_embedder.weight, newer, atol=1e-3, rtol=1e-2
    )

    judge = tmp_path / "judge.safetensors"
    judge_stage(recipe, shop, judge=judge)
    fixed = judge.read_bytes()
    judge_stage(dataclasses.replace(recipe, judge=JudgeRecipe(scenes=3, steps=2)), shop, judge=judge)
    assert judge.read_bytes() == fixed, "a judge is never trained again under the figures it gave"
    report = adherence_stage(recipe, shop, out=tmp_path / "flux", judge=judge)
    assert report["all"]["generated"]["n"] == 2
    assert set(report["judge passes"]) == {"pairs", "count", "ground", "time", "colours"}
    assert (tmp_path / "flux" / "adherence.json").exists()

    again = dataclasses.replace(shop, work=tmp_path / "again", start=tmp_path / "flux")
    autoencoder_stage(recipe, again)
    assert (tmp_path / "again" / "vae" / "model").exists()


def test_a_share_of_the_steps_lies_beside_the_whole_training(tmp_path: Path) -> None:
    """And takes the whole one's autoencoder, so that what differs is the training alone."""
    recipe, whole = tiny(4), Workshop(work=tmp_path / "work", device=torch.device("cpu"))
    for stage in (corpus_stage, autoencoder_stage, latents_stage, flow_stage):
        stage(recipe, whole)
    export_stage(recipe, whole, out=tmp_path / "flux")
    part = dataclasses.replace(whole, share=0.5, autoencoder=tmp_path / "flux")
    for stage in (flow_stage, distill_stage):
        stage(recipe, part)
    export_stage(recipe, part, out=tmp_path / "younger")
    assert describe_run(recipe, whole)["done"]["flow"]["steps"] == 4
    assert describe_run(recipe, part)["done"]["flow"]["steps"] == 2
    apart = dataclasses.replace(part, work=tmp_path / "apart")
    for stage in (corpus_stage, autoencoder_stage, latents_stage, flow_stage):
        stage(recipe, apart)
    export_stage(recipe, apart, out=tmp_path / "apart-younger")
    ours, theirs, other = (load_pipeline(tmp_path / name) for name in ("flux", "younger", "apart-younger"))
    for weight, same, also in zip(*(one.vae.parameters() for one in (ours, theirs, other)), strict=True):
        assert torch.equal(weight, same)
        assert torch.equal(weight, also)
    assert not torch.equal(ours.transformer.x_embedder.weight, theirs.transformer.x_embedder.weight)


def test_every_phase_is_shortened() -> None:
    phases = (Phase(size=16, steps=100, batch=2), Phase(size=32, steps=5, batch=1))
    shorter = FlowRecipe(phases=phases).shortened(0.1)
    assert [(phase.size, phase.steps) for phase in shorter.phases] == [(16, 10), (32, 1)]
    assert FlowRecipe(phases=phases).shortened(1.0).phases == phases
