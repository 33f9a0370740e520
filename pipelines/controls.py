"""Heads on flux-scenes against the same heads on controls: what does the trained backbone bring, and which t?

    python pipelines/controls.py --work controls-work             # hours on two cores; run again, it goes on
    python pipelines/controls.py --work controls-quick --quick    # minutes: only to see that it runs
    python pipelines/controls.py --work controls-work --task segmentation --row "VAE latent"  # a part

Every row is the same training (samples, batches, steps, seeds, decoder, loss) on other features: four
timesteps of the trained backbone, the same as int8, each timestep alone, four timesteps of a backbone of the
same shape with random weights, the clean VAE latent. The working folder gets results.jsonl (one line a
training; what has one is not trained again), table.md, int8.md and loss-<task>.png; docs/experiments.md says
what came out.
"""

import argparse
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import numpy as np
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

import mmdiff_cache as mm
from mmdiff_cache.backbones.registry import BACKBONES
from mmdiff_cache.datasets.concepts import DEFAULT
from mmdiff_cache.flux_scenes.build import load_pipeline, save_pipeline
from mmdiff_cache.flux_scenes.curves import draw_lines
from mmdiff_cache.store.convert import Selection, convert, plan_conversion
from mmdiff_cache.store.reader import SplitReader, open_store
from mmdiff_cache.tasks import better, find_task, headline
from mmdiff_cache.training.baselines import on_latents
from mmdiff_cache.training.build import open_dataset
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.run import Run, model_for_run, store_of
from mmdiff_cache.training.scoring import model_predictor, score

log = logging.getLogger("controls")

DATASET, BACKBONE = "scenes", "flux-scenes"
TASKS = ("segmentation", "saliency", "depth")
FOUR = (0.78, 0.52, 0.26, 0.001)
NINE = (0.9, 0.78, 0.64, 0.52, 0.35, 0.26, 0.15, 0.05, 0.001)
TRAINED, RANDOM, INT8 = "trained", "random", "int8"
FULL, SINGLE = "four timesteps", "t = {:g}"
SHOWN = ("task", "row", "seed", "val", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is spent."""

    limit: int
    """Samples of a split, where it has as many."""
    steps: Mapping[str, int]
    """By task."""
    seeds: tuple[int, ...]
    tasks: tuple[str, ...] = TASKS
    rows: tuple[str, ...] = ()
    """Names of those that are trained; empty means all."""


WHOLE = Size(limit=512, steps={"segmentation": 1440, "saliency": 480, "depth": 720}, seeds=(0, 1, 2))
QUICK = Size(limit=16, steps=dict.fromkeys(TASKS, 4), seeds=(0, 1))


def row_configs(task: str, size: Size, seed: int, work: Path) -> dict[str, mm.TrainConfig]:
    """The training of every row, by the row's name."""
    full = mm.TrainConfig(
        task=task,
        stores=(str(work / TRAINED),),
        timesteps=FOUR,
        steps=size.steps[task],
        batch_size=8,
        learning_rate=3e-3,
        decoder_rate=1.0,
        precision="bfloat16",
        limit=size.limit,
        seed=seed,
    )
    rows = {
        FULL: full,
        "four timesteps, int8": replace(full, stores=(str(work / INT8),)),
        "random backbone": replace(full, stores=(str(work / RANDOM),)),
        "VAE latent": on_latents(full),
        **{SINGLE.format(t): replace(full, timesteps=(t,)) for t in NINE},
    }
    folder = work / "runs" / f"{task}-{size.steps[task]}"
    return {
        name: replace(config, run=str(folder / name.replace(" ", "") / str(seed)))
        for name, config in rows.items()
        if name in (size.rows or rows)
    }


def randomised(work: Path) -> Path:
    """The bundled pipeline with a transformer of diffusers' initial weights in place of the trained one."""
    folder = work / "flux-random"
    if not (folder / "model_index.json").exists():
        pipeline = load_pipeline(BACKBONES[BACKBONE].source)
        torch.manual_seed(0)
        pipeline.register_modules(transformer=FluxTransformer2DModel.from_config(pipeline.transformer.config))
        save_pipeline(pipeline, folder)
    return folder


def make_stores(size: Size, work: Path) -> None:
    """The stores of the trained and of the random backbone, and the trained one's four timesteps as int8."""
    trained = mm.ExtractConfig(
        dataset=DATASET,
        backbone=BACKBONE,
        limit=size.limit,
        timesteps=NINE,
        concepts={task: DEFAULT[task] for task in TASKS},
        store=str(work / TRAINED),
    )
    random = replace(trained, backbone=str(randomised(work)), timesteps=FOUR, store=str(work / RANDOM))
    for config in (trained, random):
        plan = mm.plan(config)
        log.info("stage one\n%s", plan)
        mm.extract(plan)
    convert(plan_conversion(work / TRAINED, work / INT8, Selection(timesteps=FOUR, codec="int8")))


def train_and_score(config: mm.TrainConfig, row: str) -> dict[str, Any]:
    """One training to its end, and what is kept of it: scores with averaged weights, and both curves."""
    torch.set_num_threads(1)
    run = mm.train(config)
    task, lines = find_task(config.task), read_metrics(run.path)
    key = headline(task, DATASET)
    found = {
        **_asked(config, row),
        **{split: _headline(run, split) for split in ("val", "test")},
        "loss": _smooth([(line["step"], line["loss"]) for line in lines if "loss" in line]),
        "held_out": [(line["step"], line["held_out"]["ema"][key]) for line in lines if "held_out" in line],
    }
    if row == FULL:
        baselines = mm.evaluate(run, split="test").baselines
        found["label_free"] = {name: scores[key] for name, scores in baselines.items()}
    return found


def _asked(config: mm.TrainConfig, row: str) -> dict[str, Any]:
    """What tells one training from all others: lines of other weights, samples or steps do not count."""
    fingerprint = open_store(config.stores[0]).manifest.fingerprint
    asked = {"task": config.task, "row": row, "seed": config.seed, "steps": config.steps}
    return {**asked, "limit": config.limit, "store": fingerprint}


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


def _smooth(losses: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of every twentieth of a training."""
    size = max(1, len(losses) // 20)
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [(part[-1][0], round(mean(loss for _, loss in part), 5)) for part in parts]


def train_all(size: Size, work: Path, results: Path, workers: int) -> list[dict[str, Any]]:
    """Every row, task and seed that has no line in the file of results yet; all lines that count."""
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    found: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting: list[Future[dict[str, Any]]] = []
        for seed, task in product(size.seeds, size.tasks):
            for row, config in row_configs(task, size, seed, work).items():
                asked = _asked(config, row)
                line = next((line for line in done if asked.items() <= line.items()), None)
                if line is None:
                    waiting.append(pool.submit(train_and_score, config, row))
                else:
                    found.append(line)
        for number, future in enumerate(as_completed(waiting), 1):
            try:
                line = future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # or the rest would be trained for nothing
                raise
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            log.info("%d of %d: %s", number, len(waiting), {name: line[name] for name in SHOWN})
            found.append(line)
    return found


def write_report(lines: list[dict[str, Any]], work: Path) -> None:
    """table.md, and a picture of the training curves a task."""
    tables: list[str] = []
    for task in dict.fromkeys(line["task"] for line in lines):
        rows: dict[str, list[dict[str, Any]]] = {}
        for line in sorted((line for line in lines if line["task"] == task), key=lambda one: one["seed"]):
            rows.setdefault(line["row"], []).append(line)
        tables += _table(task, rows)
        caption = f"{task}: training loss by step, each point the mean of 1/20 of the steps and of all seeds"
        series = {name: _mean_curve([run["loss"] for run in runs]) for name, runs in rows.items()}
        draw_lines(series, caption).save(work / f"loss-{task}.png", optimize=True)
    (work / "table.md").write_text("\n".join(tables))
    log.info("%s\n\n%s", work / "table.md", "\n".join(tables))


def _table(task: str, rows: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    entry = find_task(task)
    validation = {name: mean(run["val"] for run in runs) for name, runs in rows.items()}
    best: str | None = None
    for name in (name for name in map(SINGLE.format, NINE) if name in rows):
        if better(entry, validation[name], None if best is None else validation[best]):
            best = name
    order = "higher" if entry.higher_is_better else "lower"
    lines = [f"**{task}**, {headline(entry, DATASET)} ({order} is better)", ""]
    lines += ["| features | test | validation | held-out score, last fifth |", "|---|---|---|---|"]
    for name in [name for name in row_configs(task, WHOLE, 0, Path()) if name in rows]:
        shown = f"**{name}** (best single one on validation)" if name == best else name
        curve = _mean_curve([run["held_out"] for run in rows[name]])
        late = [value for step, value in curve if step >= 0.8 * curve[-1][0]]
        spread = [_spread([run[split] for run in rows[name]]) for split in ("test", "val")]
        lines.append(f"| {shown} | {spread[0]} | {spread[1]} | {late[-1] - late[0]:+.3f} |")
    label_free = next(
        (run["label_free"] for runs in rows.values() for run in runs if "label_free" in run), {}
    )
    return [*lines, *(f"| *{name}* | {value:.3f} | | |" for name, value in label_free.items()), "", ""]


def write_int8(work: Path) -> None:
    """int8.md: what the int8 store saves, and how far its features are from the lossless ones."""
    lossless, rounded = open_store(work / TRAINED)["test"], open_store(work / INT8)["test"]
    difference, whole, cosines = 0.0, 0.0, list[float]()
    for sample, t, layer in product(range(min(32, len(rounded))), rounded.timesteps, rounded.layers):
        one, other = (reader.read(sample, t, layer).astype(np.float64) for reader in (lossless, rounded))
        difference, whole = difference + float(((one - other) ** 2).sum()), whole + float((one**2).sum())
        norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        cosines.append(float(((one * other).sum(axis=-1) / norms).min()))
    sizes = [_hidden_bytes(reader) / len(reader.timesteps) for reader in (lossless, rounded)]
    text = (
        f"hidden states of int8: {sizes[1] / sizes[0]:.2f} of the lossless bytes, relative error "
        f"{(difference / whole) ** 0.5:.4f} (L2), smallest cosine of a token {min(cosines):.6f}"
    )
    (work / "int8.md").write_text(text + "\n")
    log.info(text)


def _hidden_bytes(reader: SplitReader) -> int:
    return sum(file.stat().st_size for file in (reader.path / "hidden_states").glob("c.*"))


def _mean_curve(curves: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean over trainings, step by step."""
    return [(points[0][0], mean(value for _, value in points)) for points in zip(*curves, strict=True)]


def _spread(values: list[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread} (n = {len(values)})"


def main() -> None:
    """Read the command line and run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="working folder, 5 GB; kept for going on")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="trainings side by side")
    parser.add_argument("--results", type=Path, help="one line a training; WORK/results.jsonl by default")
    parser.add_argument("--quick", action="store_true", help="a few samples and steps")
    parser.add_argument("--task", action="append", choices=TASKS, help="only these; by default all")
    parser.add_argument("--row", action="append", help="only these; by default all")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    size, work = QUICK if asked.quick else WHOLE, asked.work.absolute()
    size = replace(
        size,
        tasks=tuple(asked.task or TASKS),
        rows=tuple(asked.row or ()),
    )
    work.mkdir(parents=True, exist_ok=True)
    make_stores(size, work)
    write_int8(work)
    write_report(train_all(size, work, asked.results or work / "results.jsonl", asked.workers), work)


if __name__ == "__main__":
    main()
