"""Eight decoders in one sweep, against eight trainings: bytes read from the store, and seconds.

    python benchmarks/bench_sweep.py [--samples 24] [--rounds 3] [--out benchmarks/results/NAME.md]

Both ways train the same heads for the same steps, interleaved, on an otherwise idle machine. Nothing is kept
between epochs (memory 0), so every epoch reads the store again, as it does where the store is larger than
memory. Bytes are those of the chunks that the reader takes from files; reading is the time that the loop
waits for batches, computing is the rest (planning, checkpoints and the final table with it).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rounds import features, manifest, publish

from mmdiff_cache.config import AggregatorConfig, TrainConfig
from mmdiff_cache.loader import make_loader
from mmdiff_cache.records import STATISTICS, FeatureBatch, LabelSpec, PreparedSample
from mmdiff_cache.store import chunks
from mmdiff_cache.store.schema import LabelArray
from mmdiff_cache.store.writer import open_writer
from mmdiff_cache.sweeps import sweep
from mmdiff_cache.training import loop
from mmdiff_cache.training.run import train

TOGETHER, ALONE = "one sweep", "one by one"
CLASSES = ("sky", "ground", "ball", "box")
PIXELS = 4
"""Pixels of a token's side: pictures are not what is measured."""


@dataclass
class Counted:
    """What one way took."""

    read_bytes: int = 0
    waiting: float = 0.0
    seconds: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)


def command_line() -> argparse.Namespace:
    """The options; small by default."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--grid", type=int, default=16, help="tokens a side")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--decoders", type=int, default=8, help="heads that are trained")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="five or more give a usable spread")
    parser.add_argument("--out", type=Path, help="also write the table here")
    return parser.parse_args()


def write_store(path: Path, samples: int, grid: int, channels: int) -> Path:
    """A store of the paper's sixteen maps and one label set, through the ordinary writer."""
    plan = manifest(samples, grid, channels)
    side = (grid * PIXELS, grid * PIXELS)
    label = LabelArray(spec=LabelSpec(name="segmentation", kind="classes", classes=CLASSES), canvas=side)
    plan = replace(plan, schema=replace(plan.schema, image_size=side, labels=(label,)))
    with open_writer(path, plan) as writer, writer.begin(writer.pending("train")[0]) as partition:
        for number, sample_id in enumerate(plan.splits["train"]):
            partition.write(number, [_sample(sample_id, number, side)], _features(plan.schema, number))
        partition.commit()
    return path


def _sample(sample_id: str, number: int, side: tuple[int, int]) -> PreparedSample:
    classes = np.random.default_rng(number).integers(0, len(CLASSES), side).astype(np.uint8)
    labels = {"segmentation": classes}
    return PreparedSample(
        sample_id=sample_id,
        image=np.zeros((*side, 3), np.uint8),
        prompt="",
        labels=labels,
        original_labels=labels,
        content_hash="0" * 64,
    )


def _features(schema: Any, number: int) -> FeatureBatch:
    maps = (1, 1, len(schema.timesteps), len(schema.layers), len(STATISTICS))
    return FeatureBatch(
        hidden_states=features(schema, number)[None, None],
        concept_scores={},
        concept_maps={},
        latents=np.zeros((1, *schema.grid, schema.latent_channels), np.float32),
        audit=np.zeros(maps, np.float32),
    )


def configs(store: Path, asked: argparse.Namespace) -> list[TrainConfig]:
    """Linear and DPT heads with seeds of their own, whose samples come in one order."""
    batch = min(4, asked.samples)
    return [
        TrainConfig(
            task="segmentation",
            stores=(str(store),),
            concepts="none",
            decoder=("linear", "dpt")[number % 2],
            aggregator=AggregatorConfig(width=32, depth=1, heads=4),
            steps=max(1, asked.epochs * asked.samples // batch),
            batch_size=batch,
            holdout=0.0,
            seed=number,
            order_seed=0,
            memory=0,
            device="cpu",
        )
        for number in range(asked.decoders)
    ]


def counted(work: Callable[[], object], into: Counted) -> None:
    """Run a way, counting the bytes of its chunks and the time that it waits for batches."""
    read_chunk = chunks.OpenShard.read

    def reading(shard: Any, number: int, target: Any) -> None:
        into.read_bytes += int(shard.places[number][1])
        read_chunk(shard, number, target)

    def waiting(*arguments: Any, **options: Any) -> Iterator[Any]:
        batches = make_loader(*arguments, **options)
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            into.waiting += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    into.read_bytes, into.waiting = 0, 0.0
    begun = time.perf_counter()
    with patch.object(chunks.OpenShard, "read", reading), patch.object(loop, "make_loader", waiting):
        work()
    into.seconds.append(time.perf_counter() - begun)
    into.reading.append(into.waiting)
    into.bytes.append(into.read_bytes)


def main() -> None:
    """Read the command line, measure, print."""
    asked = command_line()
    ways = {TOGETHER: Counted(), ALONE: Counted()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = configs(write_store(folder / "store", asked.samples, asked.grid, asked.channels), asked)
        for number in range(asked.rounds + 1):
            result: list[Any] = []
            counted(
                lambda at=folder / f"sweep-{number}", found=result: found.append(
                    sweep(chosen, at, workers=0, evaluate=False)
                ),
                ways[TOGETHER],
            )
            assert not result[0].failed, result[0].failed
            counted(
                lambda at=folder / f"alone-{number}": [
                    train(replace(config, run=str(at / str(n)))) for n, config in enumerate(chosen)
                ],
                ways[ALONE],
            )
    publish(table(asked, ways), asked.out)


def table(asked: argparse.Namespace, ways: dict[str, Counted]) -> list[str]:
    """The result as lines of Markdown; the first round is not counted."""
    lines = [
        f"# A sweep of {asked.decoders} decoders, {time.strftime('%Y-%m-%d')}",
        "",
        f"{asked.samples} samples of 4 x 4 maps of {asked.grid} x {asked.grid} x {asked.channels} float16, "
        f"{asked.epochs} epochs, memory 0, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{asked.rounds} interleaved rounds, median (range).",
        "",
        "| | bytes read | seconds | of these waiting for batches | computing and the rest |",
        "|---|---|---|---|---|",
    ]
    for name, way in ways.items():
        rest = [whole - part for whole, part in zip(way.seconds, way.reading, strict=True)]
        cells = (_median(values[1:]) for values in (way.seconds, way.reading, rest))
        lines.append(f"| {name} | {statistics.median(way.bytes[1:]) / 1e6:,.1f} MB | {' | '.join(cells)} |")
    together, alone = ways[TOGETHER], ways[ALONE]
    share = together.bytes[-1] / alone.bytes[-1]
    faster = [mine / other for mine, other in zip(together.seconds[1:], alone.seconds[1:], strict=True)]
    return [
        *lines,
        "",
        f"Bytes: {share:.3f} of one by one (1 / {1 / share:.1f}). Seconds: {_median(faster)} of it.",
    ]


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
