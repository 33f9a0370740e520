"""Trains flux-scenes, the bundled generative backbone, from nothing: the choices, and the command.

    python pipelines/flux_scenes.py --work flux-work                 # every stage, going on where it stopped
    python pipelines/flux_scenes.py --work flux-work --stage flow    # one stage
    python pipelines/flux_scenes.py --work flux-work --init mmdiff_cache/assets/flux-scenes --device cuda
    python pipelines/flux_scenes.py --work flux-work --share 0.1    # a tenth of it, for table_growth.py

What came out, with hours and figures, is in mmdiff_cache/assets/flux-scenes/README.md.
"""

import argparse
import logging
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch

from mmdiff_cache.experiments.control_backbones import younger_backbone
from mmdiff_cache.flux_scenes.adherence import Trial
from mmdiff_cache.flux_scenes.autoencoder import AutoencoderRecipe
from mmdiff_cache.flux_scenes.build import Architecture
from mmdiff_cache.flux_scenes.distill import DistillRecipe
from mmdiff_cache.flux_scenes.judge import JudgeRecipe
from mmdiff_cache.flux_scenes.rectified_flow import FlowRecipe, Phase
from mmdiff_cache.flux_scenes.stages import (
    Recipe,
    Workshop,
    adherence_stage,
    autoencoder_stage,
    corpus_stage,
    distill_stage,
    export_stage,
    flow_stage,
    judge_stage,
    latents_stage,
    pictures_stage,
)

WEIGHTS = Path(__file__).parents[1] / "mmdiff_cache" / "assets" / "flux-scenes"
JUDGE = WEIGHTS.with_name("flux-scenes-judge.safetensors")
STAGES = (
    *("corpus", "autoencoder", "latents", "flow", "distill", "export"),
    *("judge", "adherence", "pictures"),
)


def cpu(*, warm: bool = False) -> Recipe:
    """One thread of a CPU, an hour or two; compiled blocks, bf16. A warm start needs no small pictures."""
    small, large = Phase(size=64, steps=1000, batch=32), Phase(size=128, steps=5000, batch=16)
    return Recipe(
        architecture=Architecture(),
        scenes=16384,
        held_out=512,
        autoencoder=AutoencoderRecipe(
            steps=2500, batch=8, learning_rate=2e-3, warmup=30, whole_share=0.1, shards=4
        ),
        flow=FlowRecipe(phases=(large,) if warm else (small, large)),
        distill=DistillRecipe(steps=240, batch=8, compiled=False),
        judge=JudgeRecipe(scenes=8000, steps=10000, batch=16),
        trial=Trial(),
    )


def cuda() -> Recipe:
    """The same on a GPU: larger batches, more steps."""
    return Recipe(
        architecture=Architecture(),
        scenes=65536,
        held_out=512,
        autoencoder=AutoencoderRecipe(steps=12000, batch=64, whole_share=0.2, shards=128),
        flow=FlowRecipe(
            phases=(Phase(size=64, steps=8000, batch=256), Phase(size=128, steps=30000, batch=256))
        ),
        distill=DistillRecipe(steps=3000, batch=256),
        judge=JudgeRecipe(scenes=20000, steps=6000, batch=64),
        trial=Trial(),
    )


def main() -> None:
    """Read the command line and run the stages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="working folder, a few GB; kept for going on"
    )
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this stage; may be repeated")
    parser.add_argument("--init", type=Path, help="a pipeline folder to start from instead of from nothing")
    parser.add_argument(
        "--share", type=share, default=1.0, help="of the flow's steps, on the bundled autoencoder"
    )
    parser.add_argument(
        "--out", type=Path, help="where export writes the pipeline; the package's own weights"
    )
    parser.add_argument("--judge", type=Path, default=JUDGE, help="the judge; trained where it is missing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    torch.set_num_threads(asked.threads)
    torch.set_flush_denormal(True)
    recipe = cuda() if asked.device.startswith("cuda") else cpu(warm=asked.init is not None)
    shop = Workshop(
        work=asked.work,
        device=torch.device(asked.device),
        workers=asked.threads,
        start=asked.init,
        autoencoder=None if asked.share == 1 else WEIGHTS,
        share=asked.share,
    )
    whole = asked.share == 1
    out = asked.out or (WEIGHTS if whole else Path(younger_backbone("flux-scenes", asked.share)))
    try:
        for stage in asked.stage or (STAGES if whole else STAGES[: STAGES.index("judge")]):
            run_stage(stage, recipe, shop, out=out, judge=asked.judge)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the checkpoint") from None


def share(text: str) -> float:
    """A number above 0 and not above 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError(text)
    return value


def run_stage(stage: str, recipe: Recipe, shop: Workshop, *, out: Path, judge: Path) -> None:
    """One stage by its name."""
    match stage:
        case "corpus":
            corpus_stage(recipe, shop)
        case "autoencoder":
            autoencoder_stage(recipe, shop)
        case "latents":
            latents_stage(recipe, shop)
        case "flow":
            flow_stage(recipe, shop)
        case "distill":
            distill_stage(recipe, shop)
        case "export":
            export_stage(recipe, shop, out=out)
        case "judge":
            judge_stage(recipe, shop, judge=judge)
        case "adherence":
            adherence_stage(recipe, shop, out=out, judge=judge)
        case _:
            pictures_stage(recipe, shop, out=out)


if __name__ == "__main__":
    main()
