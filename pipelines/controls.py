"""Heads on flux-scenes against the same heads on controls: what does the trained backbone bring, and which t?

    python pipelines/controls.py --work controls-work             # hours on two cores; run again, it goes on
    python pipelines/controls.py --work controls-quick --quick    # minutes: only to see that it runs

Every row is the same training (samples, batches, steps, seeds, decoder, loss) on other features: four
timesteps of the trained backbone, each timestep alone, four timesteps of a backbone of the same shape with
random weights, the clean VAE latent. The working folder gets table.md, results.json and
loss-<task>.png; docs/experiments.md says what came out.
"""

import argparse
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

import mmdiff_cache as mm
from mmdiff_cache.backbones.registry import BACKBONES
from mmdiff_cache.flux_scenes.build import load_pipeline, save_pipeline
from mmdiff_cache.flux_scenes.curves import draw_lines
from mmdiff_cache.tasks import better, find_task, headline
from mmdiff_cache.training.baselines import on_latents
from mmdiff_cache.training.build import open_dataset
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.run import Run, load_run, model_for_run, store_of
from mmdiff_cache.training.scoring import model_predictor, score

log = logging.getLogger("controls")

DATASET, BACKBONE = "scenes", "flux-scenes"
TASKS = ("segmentation", "saliency", "depth")
FOUR = (0.78, 0.52, 0.26, 0.001)
NINE = (0.9, 0.78, 0.64, 0.52, 0.35, 0.26, 0.15, 0.05, 0.001)
TRAINED, RANDOM = "trained", "random"
FULL, SINGLE = "four timesteps", "t = {:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is spent."""

    limit: int
    """Samples of a split, where it has as many."""
    steps: int
    seeds: tuple[int, ...]


WHOLE = Size(limit=512, steps=240, seeds=(0, 1, 2))
QUICK = Size(limit=16, steps=4, seeds=(0, 1))


def row_configs(task: str, size: Size, seed: int, work: Path) -> dict[str, mm.TrainConfig]:
    """The training of every row, by the row's name."""
    full = mm.TrainConfig(
        task=task,
        stores=(str(work / TRAINED),),
        timesteps=FOUR,
        steps=size.steps,
        batch_size=8,
        learning_rate=1e-3,
        decoder_rate=1.0,
        precision="bfloat16",
        seed=seed,
    )
    rows = {
        FULL: full,
        "random backbone": replace(full, stores=(str(work / RANDOM),)),
        "VAE latent": on_latents(full),
        **{SINGLE.format(t): replace(full, timesteps=(t,)) for t in NINE},
    }
    return {name: replace(config, run=str(_folder(work, task, name, seed))) for name, config in rows.items()}


def _folder(work: Path, task: str, row: str, seed: int) -> Path:
    return work / "runs" / task / row.replace(" ", "") / str(seed)


def randomised(work: Path) -> Path:
    """The bundled pipeline with a transformer of diffusers' initial weights in place of the trained one."""
    folder = work / "flux-random"
    if not (folder / "model_index.json").exists():
        pipeline = load_pipeline(BACKBONES[BACKBONE].source)
        torch.manual_seed(0)
        pipeline.register_modules(transformer=FluxTransformer2DModel.from_config(pipeline.transformer.config))
        save_pipeline(pipeline, folder)
    return folder


def extract_both(size: Size, work: Path) -> None:
    """The stores of the trained and of the random backbone."""
    trained = mm.ExtractConfig(
        dataset=DATASET,
        backbone=BACKBONE,
        limit=size.limit,
        timesteps=NINE,
        store=str(work / TRAINED),
    )
    random = replace(trained, backbone=str(randomised(work)), timesteps=FOUR, store=str(work / RANDOM))
    for config in (trained, random):
        plan = mm.plan(config)
        log.info("stage one\n%s", plan)
        mm.extract(plan)


def train_and_score(config: mm.TrainConfig) -> None:
    """One training to its end, then its scores on validation and test (averaged weights), kept beside it."""
    torch.set_num_threads(1)
    run = mm.train(config)
    kept = run.path / "scores.json"
    if not kept.exists():
        kept.write_text(json.dumps({split: _headline(run, split) for split in ("val", "test")}))


def _headline(run: Run, split: str) -> float:
    task = find_task(run.config.task)
    found = score(
        {"ema": model_predictor(model_for_run(run), task, run.config.precision)},
        open_dataset(run.config, store_of(run), split),
        task,
        data_set=DATASET,
        original=True,
        batch_size=8,
    )
    return found["ema"].overall[headline(task, DATASET)]


def train_all(size: Size, work: Path, workers: int) -> None:
    """Every row, task and seed that is not finished yet, seed by seed."""
    todo = [
        config
        for seed, task in product(size.seeds, TASKS)
        for config in row_configs(task, size, seed, work).values()
        if not (Path(str(config.run)) / "scores.json").exists()
    ]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(train_and_score, config): config for config in todo}
        for number, done in enumerate(as_completed(waiting), 1):
            done.result()
            log.info("%d of %d: %s", number, len(todo), waiting[done].run)


def collect(size: Size, work: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """By task and row: scores of all seeds, losses, and how far the held-out score moved at the end."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for task in TASKS:
        names = row_configs(task, size, 0, work)
        found[task] = {name: _collect_row(task, name, size, work) for name in names}
    return found


def _collect_row(task: str, name: str, size: Size, work: Path) -> dict[str, Any]:
    folders = [_folder(work, task, name, seed) for seed in size.seeds]
    scores = [json.loads((folder / "scores.json").read_text()) for folder in folders]
    key = headline(find_task(task), DATASET)
    lines = [line for folder in folders for line in read_metrics(folder)]
    window = max(1, size.steps // 20)
    losses: dict[int, list[float]] = {}
    held_out: dict[int, list[float]] = {}
    for line in lines:
        if "loss" in line:
            losses.setdefault(-(-line["step"] // window) * window, []).append(line["loss"])
        else:
            held_out.setdefault(line["step"], []).append(line["held_out"]["ema"][key])
    late = [mean(values) for step, values in sorted(held_out.items()) if step >= 0.8 * size.steps]
    return {
        "val": [one["val"] for one in scores],
        "test": [one["test"] for one in scores],
        "loss_curve": [(step, mean(values)) for step, values in sorted(losses.items())],
        "moved": late[-1] - late[0],
    }


def label_free(size: Size, work: Path) -> dict[str, dict[str, float]]:
    """By task: the headline score of every baseline that needs no training, on the test split."""
    found: dict[str, dict[str, float]] = {}
    for task in TASKS:
        result = mm.evaluate(load_run(_folder(work, task, FULL, size.seeds[0])), split="test")
        found[task] = {name: scores[result.headline] for name, scores in result.baselines.items()}
    return found


def write_report(rows: Mapping[str, Any], baselines: Mapping[str, Any], size: Size, work: Path) -> None:
    """results.json, table.md and a picture of the curves a task."""
    (work / "results.json").write_text(json.dumps({"rows": rows, "label-free": baselines}, indent=2) + "\n")
    lines = [line for task in TASKS for line in _table(task, rows[task], baselines[task])]
    (work / "table.md").write_text("\n".join(lines) + "\n")
    log.info("%s\n\n%s", work / "table.md", "\n".join(lines))
    for task in TASKS:
        series = {name: row["loss_curve"] for name, row in rows[task].items()}
        caption = f"{task}: training loss by step, mean over {len(size.seeds)} seeds and 1/20 of the steps"
        draw_lines(series, caption).save(work / f"loss-{task}.png", optimize=True)


def _table(task: str, rows: Mapping[str, Any], baselines: Mapping[str, float]) -> list[str]:
    entry = find_task(task)
    best: str | None = None
    for name in map(SINGLE.format, NINE):
        if better(entry, mean(rows[name]["val"]), None if best is None else mean(rows[best]["val"])):
            best = name
    order = "higher" if entry.higher_is_better else "lower"
    lines = [f"**{task}**, {headline(entry, DATASET)} ({order} is better)", ""]
    lines += ["| features | test | validation | moved over the last fifth |", "|---|---|---|---|"]
    for name, row in rows.items():
        shown = f"**{name}** (best single one on validation)" if name == best else name
        lines.append(f"| {shown} | {_spread(row['test'])} | {_spread(row['val'])} | {row['moved']:+.3f} |")
    lines += [f"| *{name}* | {value:.3f} | | |" for name, value in baselines.items()]
    return [*lines, ""]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def main() -> None:
    """Read the command line and run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="working folder, 5 GB; kept for going on")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="trainings side by side")
    parser.add_argument("--quick", action="store_true", help="a few samples and steps")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    size, work = QUICK if asked.quick else WHOLE, asked.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    extract_both(size, work)
    train_all(size, work, asked.workers)
    write_report(collect(size, work), label_free(size, work), size, work)


if __name__ == "__main__":
    main()
