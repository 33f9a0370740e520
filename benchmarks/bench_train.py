"""A training step: fed from a store against data already on the device; our transformer against PyTorch's.

    python benchmarks/bench_train.py [--size scenes|paper] [--batch 8] [--device cpu|cuda]
        [--precision float32|bfloat16] [--threads N] [--rounds 9] [--out benchmarks/results/NAME.md]

All ways run in the same process, interleaved; each figure is the median over rounds of the ratio to the
other way of the same round, with the interquartile range. Take it on an otherwise idle machine. The defaults
need a minute on two cores; `--size paper` reads 101 MB a sample and needs a GPU, or `--batch 1` and patience.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from rounds import batch, features, interleaved, manifest, publish, ratios
from torch import Tensor, nn

from mmdiff_cache.config import AggregatorConfig, TrainConfig
from mmdiff_cache.loader import Batch, make_loader
from mmdiff_cache.loader.prefetch import BATCHES_AHEAD
from mmdiff_cache.models.temporal import TemporalTransformer
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.store.schema import LabelArray
from mmdiff_cache.store.writer import open_writer
from mmdiff_cache.training.build import set_up
from mmdiff_cache.training.resolve import pick_device, resolve
from mmdiff_cache.training.run import flushing_denormals
from mmdiff_cache.training.scoring import autocast
from mmdiff_cache.training.trainer import Trainer

DEPTH = LabelSpec(name="depth", kind="depth", valid_range=(0.1, 40.0))
OURS, THEIRS = "ours", "theirs"
FED, HELD, READ = "fed from the store", "data on the device", "reading alone"
PLAIN, BRANCHES, NONE = "dropout 0.1 as each has it", "dropout 0.1 on the branches alone", "no dropout"
"""PyTorch's layer drops inside attention and MLP too, ours on the branches alone (docs/paper-notes.md)."""
FEEDING_AIM, TRANSFORMER_AIM = 0.90, 2.0
TIMESTEPS = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Of one backbone: C, D, tokens a side, pixels of a token's side, samples in the store."""

    channels: int
    width: int
    grid: int
    patch: int
    samples: int


SIZES = {
    "scenes": Size(channels=128, width=64, grid=16, patch=8, samples=64),
    "paper": Size(channels=3072, width=768, grid=32, patch=16, samples=16),
}


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="scenes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, help="of torch; by default one a core")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="both transformers")
    parser.add_argument("--checkpointing", action="store_true", help="of the aggregators, in the fed step")
    parser.add_argument("--rounds", type=int, default=9, help="five or more give a usable spread")
    parser.add_argument("--steps", type=int, default=8, help="of each way in a round")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    return parser


def write_store(path: Path, size: Size) -> None:
    """Feature-like hidden states of 4 layers and 4 timesteps, with depth labels at network size."""
    side = size.grid * size.patch
    plain = manifest(size.samples, size.grid, size.channels)
    schema = dataclasses.replace(
        plain.schema, image_size=(side, side), labels=(LabelArray(spec=DEPTH, canvas=(side, side)),)
    )
    plan = dataclasses.replace(plain, schema=schema)
    with open_writer(path, plan) as writer, writer.begin(writer.pending("train")[0]) as partition:
        for number, sample_id in enumerate(plan.splits["train"]):
            samples, found = batch(schema, sample_id, features(schema, number))
            depth = {"depth": np.full((side, side), 2.0 + number, np.float32)}
            labelled = dataclasses.replace(samples[0], labels=depth, original_labels=depth)
            partition.write(number, [labelled], found)
        partition.commit()


def on_device(held: Batch, device: torch.device) -> Batch:
    """A batch whose tensors no longer have to be copied."""
    targets = {name: target.to(device) for name, target in held.targets.items()}
    return dataclasses.replace(held, hidden_states=held.hidden_states.to(device), targets=targets)


def finish(device: torch.device) -> None:
    """Wait for what a GPU has still to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def feeding(asked: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of `steps` training steps in every round, one way and the other.

    A fed round begins with the loader full, as it is in a training, reading alone with what waited used up.
    Both read on beyond the last batch that is counted, so that each one that is counted pays for one read.
    """
    size = SIZES[asked.size]
    write_store(folder / "store", size)
    config = TrainConfig(
        task="depth",
        stores=(str(folder / "store"),),
        concepts="none",
        holdout=0.0,
        memory=0,
        batch_size=asked.batch,
        steps=1_000_000,
        aggregator=AggregatorConfig(width=size.width, checkpointing=asked.checkpointing),
        device=asked.device,
        precision=asked.precision,
        compile=asked.compile,
    )
    trainer = Trainer(set_up(resolve(config)), folder / "run")
    (part,) = trainer.setup.parts
    samples, first = part.samples, range(asked.batch)
    held = [on_device(samples.batch(first), trainer.device) for _ in range(2)]

    def timed(work: Callable[[int], object]) -> float:
        begun = time.perf_counter()
        for number in range(asked.steps):
            work(number)
        finish(trainer.device)
        return time.perf_counter() - begun

    def learn(found: Batch) -> object:
        return trainer.learn(found, part)

    taken: dict[str, list[float]] = {FED: [], HELD: [], READ: []}
    for number in range(asked.rounds + 1):
        seconds = {HELD: timed(lambda step: learn(held[step % 2]))}
        for way in (FED, READ):
            steps, use = asked.steps + 2 * BATCHES_AHEAD + 1, learn if way == FED else len_of
            feed = make_loader(samples, asked.batch, seed=number, drop_last=True, steps=steps)
            for _ in range(1 if way == FED else BATCHES_AHEAD + 1):
                use(next(feed))
            seconds[way] = timed(lambda step, feed=feed, use=use: use(next(feed)))
            cast(Generator[Batch], feed).close()
        if number:
            for way, value in seconds.items():
                taken[way].append(value)
    return taken


def len_of(found: Batch) -> int:
    """Take a batch and do nothing with it."""
    return len(found.ids)


def encoder(size: Size, dropout: float, *, everywhere: bool) -> nn.TransformerEncoder:
    """PyTorch's own, as deep, wide and pre-normed as App. F of the paper says; over [B h w, T, D]."""
    config = AggregatorConfig()
    layer = nn.TransformerEncoderLayer(
        size.width,
        config.heads,
        round(size.width * config.mlp_ratio),
        dropout=dropout,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    if not everywhere:
        layer.dropout = cast(nn.Dropout, nn.Identity())
        layer.self_attn.dropout = 0.0
    return nn.TransformerEncoder(layer, config.depth, enable_nested_tensor=False)


def transformers(asked: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of a forward and backward pass of ours and of theirs in every round, by use of dropout."""
    size, config = SIZES[asked.size], AggregatorConfig()

    def ours(dropout: float) -> TemporalTransformer:
        return TemporalTransformer(
            timesteps=TIMESTEPS,
            width=size.width,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            dropout=dropout,
            layer_scale=1e-6,
        )

    pairs = {
        PLAIN: (ours(config.dropout), encoder(size, config.dropout, everywhere=True)),
        BRANCHES: (ours(config.dropout), encoder(size, config.dropout, everywhere=False)),
        NONE: (ours(0.0), encoder(size, 0.0, everywhere=True)),
    }
    return {
        name: interleaved({OURS: work(asked, mine), THEIRS: work(asked, other)}, asked.rounds)
        for name, (mine, other) in pairs.items()
    }


def work(asked: argparse.Namespace, model: TemporalTransformer | nn.TransformerEncoder) -> Callable[[], None]:
    """One forward and backward pass of a transformer on all positions of a batch."""
    size, device = SIZES[asked.size], torch.device(pick_device(asked.device))
    positions, ours = asked.batch * size.grid**2, isinstance(model, TemporalTransformer)
    shape = (TIMESTEPS, positions) if ours else (positions, TIMESTEPS)
    x = torch.randn(*shape, size.width, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    model.to(device).train()
    if asked.compile:
        for block in model.blocks if isinstance(model, TemporalTransformer) else model.layers:
            block.compile()

    def step() -> None:
        with autocast(device, asked.precision):
            out: Tensor = model(x)
        out.backward(grad.to(out.dtype))
        model.zero_grad(set_to_none=True)
        x.grad = None
        finish(device)

    return step


def heading(asked: argparse.Namespace) -> list[str]:
    """Machine, versions and sizes, as lines of Markdown."""
    size, device = SIZES[asked.size], torch.device(pick_device(asked.device))
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    return [
        f"# A training step, size of {asked.size}, {asked.precision}, {time.strftime('%Y-%m-%d')}",
        "",
        f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch "
        f"{torch.__version__}{', compiled' if asked.compile else ''}. C = {size.channels}, D = {size.width}, "
        f"{size.grid} x {size.grid} tokens, 4 x 4 maps, batches of {asked.batch}; {asked.rounds} interleaved "
        "rounds, median (interquartile range).",
        "",
    ]


def feeding_table(taken: dict[str, list[float]], samples: int) -> list[str]:
    """Samples a second, and the speed as a share of that with the data on the device."""
    lines = [
        "**Depth head (DPT), store in the page cache, nothing kept in memory**",
        "",
        f"| | samples/s | of {HELD} |",
        "|---|---|---|",
    ]
    for way, seconds in taken.items():
        speed = samples / statistics.median(seconds)
        lines.append(f"| {way} | {speed:,.3g} | {ratios(seconds, taken[HELD])} |")
    return [*lines, "", f"Aim: {FEEDING_AIM:.2f} for a step that is fed.", ""]


def transformer_table(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Milliseconds, and how many times as fast ours is."""
    lines = [
        "**Temporal transformer alone, forward and backward, against nn.TransformerEncoder**",
        "",
        "| | ours, ms | theirs, ms | ours is faster by |",
        "|---|---|---|---|",
    ]
    for name, taken in found.items():
        mine, other = (f"{1e3 * statistics.median(taken[way]):,.1f}" for way in (OURS, THEIRS))
        lines.append(f"| {name} | {mine} | {other} | {ratios(taken[OURS], taken[THEIRS])} |")
    return [*lines, "", f"Aim: {TRANSFORMER_AIM:.1f}.", ""]


def main() -> None:
    """Read the command line, measure, print."""
    asked = command_line().parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, flushing_denormals():
        lines = heading(asked)
        lines += feeding_table(feeding(asked, Path(folder)), asked.batch * asked.steps)
        lines += transformer_table(transformers(asked))
    publish(lines, asked.out)


if __name__ == "__main__":
    main()
