"""What the cache saves: a decoder's step from the store, against the same step with the backbone in the loop.

    python benchmarks/bench_cache.py [--samples 32] [--rounds 7] [--out benchmarks/results/NAME.md]

Both ways train the same depth head on the same batches in the same process. Rounds are interleaved; each
figure is the median over rounds with the interquartile range. Take it on an otherwise idle machine.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mmdiff_cache as mm
from mmdiff_cache.datasets.transforms import prepare
from mmdiff_cache.extraction.run import load_extractor
from mmdiff_cache.loader import CachedFeatureDataset
from mmdiff_cache.training.build import build_model, for_task, set_up
from mmdiff_cache.training.resolve import resolve
from mmdiff_cache.training.scoring import forward_batch

BATCH = 8
SWEEP, PASSES = 100, 20
"""The sweep that the last line computes: decoders, and passes over the data each."""


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def spread(values: list[float]) -> str:
    """Median and interquartile range, in milliseconds."""
    low, middle, high = (1e3 * x for x in statistics.quantiles(values, n=4))
    return f"{middle:.0f} ms ({low:.0f} to {high:.0f})"


def measure(samples: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds a batch of each part: reading it, a training step, and the backbone's pass."""
    plan = mm.plan(mm.ExtractConfig(splits=("train",), limit=samples, store=str(folder / "store")))
    store = mm.extract(plan)
    setup = set_up(resolve(mm.TrainConfig(task="depth", stores=(str(store.path),), holdout=0.0)))
    extractor = load_extractor(plan.config, plan.backbone)
    scenes = [
        prepare(
            plan.dataset.load("train", index),
            plan.config.resolution or 0,
            "",
            specs=plan.dataset.label_specs,
        )
        for index in range(BATCH)
    ]
    [part] = setup.parts
    model = for_task(build_model(setup.spec).train(), part.task.name)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    cached = CachedFeatureDataset(store, "train", concepts="depth", labels=("depth",))

    def step() -> None:
        batch = cached.batch(range(BATCH))
        begun = time.perf_counter()
        loss = part.task.loss(forward_batch(model, batch), batch.targets["depth"], part.label)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        taken["step"].append(time.perf_counter() - begun)

    torch.set_flush_denormal(True)
    taken: dict[str, list[float]] = {"read": [], "step": [], "backbone": []}
    step()
    taken["step"].clear()
    for number in range(rounds):
        first = BATCH * number % (samples - BATCH + 1)
        taken["read"].append(seconds(lambda first=first: cached.batch(range(first, first + BATCH))))
        step()
        taken["backbone"].append(seconds(lambda: extractor(scenes)))
    return taken


def report(taken: dict[str, list[float]]) -> str:
    """The figures as a Markdown table, and what follows from them."""
    read, step, backbone = (statistics.median(taken[name]) for name in ("read", "step", "backbone"))
    cached, online = read + step, backbone + step
    passes = SWEEP * PASSES
    lines = [
        f"# Training from the cache against the backbone in the loop, {time.strftime('%Y-%m-%d')}",
        "",
        f"flux-scenes, 4 layers x 4 timesteps, depth head, batches of {BATCH}; {len(taken['read'])} rounds, "
        f"median (interquartile range). {platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}.",
        "",
        "| part of a training step | a batch |",
        "|---|---|",
        f"| read and decode 8 x 16 maps, concept scores, labels | {spread(taken['read'])} |",
        f"| forward, backward, optimiser | {spread(taken['step'])} |",
        f"| the backbone's pass that the cache replaces | {spread(taken['backbone'])} |",
        "",
        f"A step from the cache costs {cached / online:.2f} of a step with the backbone in the loop.",
        f"{SWEEP} decoders of {PASSES} passes each, extraction included: "
        f"{(backbone + passes * cached) / (passes * online):.2f} of the time.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the table here")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = report(measure(asked.samples, asked.rounds, Path(folder)))
    print(text)
    if asked.out:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
