"""What the benchmarks share: feature-like data, interleaved rounds, and tables of ratios to a bound."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray

from mmdiff_cache.records import STATISTICS, FeatureBatch, PreparedSample
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.schema import StoreSchema
from mmdiff_cache.store.threads import codec_threads

SIDE = 32
"""Pixels of the pictures: they are not what is measured."""


def command_line(summary: str) -> argparse.ArgumentParser:
    """The options of every benchmark here."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--samples", type=int, default=6, help="of 101 MB each, at the default shape")
    parser.add_argument("--grid", type=int, default=32, help="tokens a side")
    parser.add_argument("--channels", type=int, default=3072)
    parser.add_argument("--rounds", type=int, default=7, help="five or more give a usable spread")
    parser.add_argument("--out", type=Path, help="also write the table here")
    return parser


def manifest(samples: int, grid: int, channels: int) -> Manifest:
    """A store of the paper's four layers and four timesteps, with nothing beside the hidden states."""
    schema = StoreSchema(
        layers=("single.4", "single.15", "single.26", "single.37"),
        timesteps=(0.78, 0.52, 0.26, 0.001),
        grid=(grid, grid),
        channels=channels,
        latent_channels=4,
        image_size=(SIDE, SIDE),
        partition_size=samples,
    )
    ids = tuple(f"sample-{n}" for n in range(samples))
    identity = {"backbone": "synthetic", "noise": {"form": "flow", "seed": 0, "shared": True}}
    return Manifest(identity=identity, schema=schema, splits={"train": ids})


def features(schema: StoreSchema, number: int) -> NDArray[np.float16]:
    """Hidden states of one sample, [T L h w C], with what makes real ones compressible or not.

    Channel scales are log-normal with two massive channels, tokens vary smoothly and by noise, and values
    are those of bfloat16.
    """
    random = np.random.default_rng(number)
    steps, layers = len(schema.timesteps), len(schema.layers)
    rows, columns = schema.grid
    scales = np.exp(random.normal(0, 1, schema.channels)).astype(np.float32)
    scales[:2] *= 100
    out = np.empty((steps, layers, rows, columns, schema.channels), np.float16)
    for step in range(steps):
        for layer in range(layers):
            coarse = random.standard_normal((-(-rows // 4), -(-columns // 4), schema.channels), np.float32)
            smooth = coarse.repeat(4, 0).repeat(4, 1)[:rows, :columns]
            values = (smooth + 0.5 * random.standard_normal(smooth.shape, np.float32)) * scales
            out[step, layer] = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return out


def batch(
    schema: StoreSchema, sample_id: str, values: NDArray[np.float16]
) -> tuple[list[PreparedSample], FeatureBatch]:
    """A batch of one sample as the extraction hands it to the store."""
    picture = np.zeros((*schema.image_size, 3), np.uint8)
    sample = PreparedSample(
        sample_id=sample_id, image=picture, prompt="", labels={}, original_labels={}, content_hash="0" * 64
    )
    audit = np.zeros((1, 1, len(schema.timesteps), len(schema.layers), len(STATISTICS)), np.float32)
    found = FeatureBatch(
        hidden_states=values[None, None],
        concept_scores={},
        concept_maps={},
        latents=np.zeros((1, *schema.grid, schema.latent_channels), np.float32),
        audit=audit,
    )
    return [sample], found


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in every round, after one round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            begun = time.perf_counter()
            work()
            if number:
                taken[name].append(time.perf_counter() - begun)
    return taken


def ratios(taken: list[float], bound: list[float]) -> str:
    """Speed as a share of the bound of the same round: median (interquartile range)."""
    shares = [limit / mine for limit, mine in zip(bound, taken, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def megabytes_a_second(count: int, taken: list[float]) -> str:
    """Decoded megabytes a second, the median."""
    return f"{count / statistics.median(taken) / 1e6:,.0f}"


def heading(title: str, asked: argparse.Namespace) -> list[str]:
    """Title, machine, versions and size of what was measured, as lines of Markdown."""
    return [
        f"# {title}, {time.strftime('%Y-%m-%d')}",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, {codec_threads()} threads for ours and the bound, "
        f"Python {platform.python_version()}, zarr {zarr.__version__}, numcodecs {numcodecs.__version__}, "
        f"page cache warm. {asked.samples} samples of 4 x 4 maps of {asked.grid} x {asked.grid} x "
        f"{asked.channels} float16; {asked.rounds} interleaved rounds, median (interquartile range).",
        "",
    ]


def publish(lines: list[str], out: Path | None) -> None:
    """Print the lines, and write them where that was asked."""
    text = "\n".join(lines) + "\n"
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
