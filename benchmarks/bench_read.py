"""Reading hidden states, against the bound of the same bytes: raw file reads and raw decompression.

    python benchmarks/bench_read.py [--samples 6] [--rounds 7] [--out benchmarks/results/NAME.md]

All ways read the same samples in the same process, interleaved, on an otherwise idle machine. Where a format
has no compression or no checksum the table says so.
"""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from rounds import (
    batch,
    command_line,
    features,
    interleaved,
    manifest,
    megabytes_a_second,
    ratios,
    surroundings,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.shards import CHECKSUM_BYTES, blosc, decode_index, parse_layout
from mmdiff_cache.store.writer import open_writer

BOUND, OURS, ZARR = "raw reads and decompression (the bound)", "mmdiff-cache", "zarr-python"
TENSORS, ARRAYS = "safetensors, a file a sample", "npy, a memory map a sample"
NOTES = {
    BOUND: "no checksum",
    OURS: "zstd, crc32c, resumable",
    ZARR: "the same files",
    TENSORS: "neither compression nor checksum",
    ARRAYS: "neither compression nor checksum",
}
ONE = (1, 2)
"""Timestep and layer of the one map that is read alone."""


def write_all(folder: Path, samples: int, grid: int, channels: int) -> None:
    """The same samples in every format."""
    plan = manifest(samples, grid, channels)
    with open_writer(folder / "store", plan) as writer, writer.begin(writer.pending("train")[0]) as partition:
        for number, sample_id in enumerate(plan.splits["train"]):
            values = features(plan.schema, number)
            partition.write(number, *batch(plan.schema, sample_id, values))
            np.save(folder / f"{number}.npy", values)
            maps = {f"{t}.{layer}": values[t, layer] for t in range(4) for layer in range(4)}
            save_file(maps, folder / f"{number}.safetensors")
        partition.commit()


class Bound:
    """Every chunk with one pread and one decompression into memory that is already there."""

    def __init__(self, store: Path, samples: int, pool: ThreadPoolExecutor) -> None:
        array = store / "train.zarr/hidden_states"
        layout = parse_layout((array / "zarr.json").read_bytes())
        assert layout is not None
        shards = [array / f"c.{n}.0.0.0.0.0.0" for n in range(samples)]
        contents = [path.read_bytes() for path in shards]
        size = layout.index_bytes
        self._places = [decode_index(layout, data[-size:], len(data)) for data in contents]
        self._files = [os.open(path, os.O_RDONLY) for path in shards]
        self._pool = pool

    def read(self, out: NDArray[np.float16]) -> None:
        """Fill [B T L h w C]."""
        chunks = [(n, t, x) for n in range(len(self._files)) for t in range(4) for x in range(4)]
        list(self._pool.map(lambda chunk: self._one(out[chunk], *chunk), chunks))

    def read_one(self, out: NDArray[np.float16]) -> None:
        """Fill [B h w C] with the map ONE of every sample."""
        list(self._pool.map(lambda n: self._one(out[n], n, *ONE), range(len(self._files))))

    def _one(self, out: NDArray[np.float16], number: int, step: int, layer: int) -> None:
        offset, length = (int(x) for x in self._places[number][4 * step + layer])
        packed: Any = os.pread(self._files[number], length - CHECKSUM_BYTES, offset)
        blosc.decompress(packed, out)


def ways(folder: Path, samples: int, pool: ThreadPoolExecutor) -> dict[str, dict[str, Callable[[], object]]]:
    """How each format is read: all maps of all samples, and one map of each, into memory that is reused."""
    reader = open_store(folder / "store")["train"]
    array = zarr.open_array(folder / "store/train.zarr/hidden_states", mode="r")
    bound = Bound(folder / "store", samples, pool)
    whole = np.empty((samples, 4, 4, *reader.grid, reader.channels), np.float16)
    single = np.empty((samples, *reader.grid, reader.channels), np.float16)
    step, layer = reader.timesteps[ONE[0]], reader.layers[ONE[1]]
    everyone = range(samples)

    def fill(out: NDArray[np.float16], read: Callable[[int], Any]) -> None:
        for n in everyone:
            out[n] = read(n)

    def tensors(n: int) -> NDArray[np.float16]:
        maps = load_file(folder / f"{n}.safetensors")
        return np.stack([maps[f"{t}.{x}"] for t in range(4) for x in range(4)]).reshape(whole.shape[1:])

    def one_tensor(n: int) -> NDArray[np.float16]:
        with safe_open(folder / f"{n}.safetensors", "numpy") as file:
            return file.get_tensor(f"{ONE[0]}.{ONE[1]}")

    def mapped(n: int) -> NDArray[np.float16]:
        return np.load(folder / f"{n}.npy", mmap_mode="r")

    return {
        "all 16 maps of a sample": {
            BOUND: lambda: bound.read(whole),
            OURS: lambda: reader.hidden_states(everyone, out=whole),
            ZARR: lambda: fill(whole, lambda n: array[n, 0]),
            TENSORS: lambda: fill(whole, tensors),
            ARRAYS: lambda: fill(whole, mapped),
        },
        "one map of the 16": {
            BOUND: lambda: bound.read_one(single),
            OURS: lambda: reader.hidden_states(everyone, [step], [layer], out=single[:, None, None]),
            ZARR: lambda: fill(single, lambda n: array[n, 0, *ONE]),
            TENSORS: lambda: fill(single, one_tensor),
            ARRAYS: lambda: fill(single, lambda n: mapped(n)[ONE]),
        },
    }


def disk_bytes(folder: Path) -> dict[str, int]:
    """Bytes of each format on disk."""
    sizes = {kind: sum(p.stat().st_size for p in folder.glob(f"*.{kind}")) for kind in ("npy", "safetensors")}
    store = sum(p.stat().st_size for p in (folder / "store").rglob("c.*"))
    return {BOUND: store, OURS: store, ZARR: store, TENSORS: sizes["safetensors"], ARRAYS: sizes["npy"]}


def main() -> None:
    """Read the command line, measure, print."""
    asked = command_line((__doc__ or "").splitlines()[0]).parse_args()
    threads = os.cpu_count() or 1
    lines = [f"# Reading hidden states, {time.strftime('%Y-%m-%d')}", "", surroundings(threads), ""]
    lines += [
        f"{asked.samples} samples of 4 x 4 maps of {asked.grid} x {asked.grid} x {asked.channels} float16; "
    ]
    lines += [f"{asked.rounds} interleaved rounds, median (interquartile range).", ""]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(threads) as pool:
        folder = Path(name)
        write_all(folder, asked.samples, asked.grid, asked.channels)
        sizes, raw = disk_bytes(folder), 32 * asked.samples * asked.grid**2 * asked.channels
        for title, each in ways(folder, asked.samples, pool).items():
            taken = interleaved(each, asked.rounds)
            count = raw if "all" in title else raw // 16
            lines += [
                f"**{title}**",
                "",
                "| | MB/s | share of the bound | on disk | |",
                "|---|---|---|---|---|",
            ]
            for way, seconds in taken.items():
                share, speed = ratios(seconds, taken[BOUND]), megabytes_a_second(count, seconds)
                lines.append(f"| {way} | {speed} | {share} | {sizes[way] / raw:.2f} of raw | {NOTES[way]} |")
            lines.append("")
    text = "\n".join(lines)
    print(text)
    if asked.out:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
