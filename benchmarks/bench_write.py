"""Writing hidden states durably, against the bound: compress the same chunks, write and fsync the same bytes.

    python benchmarks/bench_write.py [--samples 6] [--rounds 7] [--out benchmarks/results/NAME.md]

All ways write the same samples, a file each, in the same process, interleaved, on an otherwise idle machine.
"""

import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from rounds import command_line, features, interleaved, manifest, megabytes_a_second, ratios, surroundings
from safetensors.numpy import save_file

from mmdiff_cache.store.files import fsync_file
from mmdiff_cache.store.metadata import split_files
from mmdiff_cache.store.shard_writer import write_shard
from mmdiff_cache.store.shards import ShardLayout, blosc, parse_layout

BOUND, OURS, ZARR = "compression and one durable write (the bound)", "mmdiff-cache", "zarr-python, then fsync"
TENSORS, ARRAYS = "safetensors, then fsync", "npy, then fsync"
NOTES = {
    BOUND: "neither checksum nor hash",
    OURS: "crc32c, SHA-256",
    ZARR: "crc32c",
    TENSORS: "neither compression nor checksum",
    ARRAYS: "neither compression nor checksum",
}
Write = Callable[[Path, NDArray[np.float16]], object]


def bound(layout: ShardLayout, pool: ThreadPoolExecutor, path: Path, values: NDArray[np.float16]) -> None:
    """All chunks compressed by threads, written in one go."""

    def packed(chunk: NDArray[np.float16]) -> bytes:
        return blosc.compress(chunk, layout.compressor.encode(), layout.level, layout.shuffle, layout.block)

    with open(path, "wb", buffering=0) as file:
        for data in pool.map(packed, values.reshape(-1, *layout.chunk[4:])):
            file.write(data)
        os.fsync(file.fileno())


def ours(layout: ShardLayout, pool: ThreadPoolExecutor, path: Path, values: NDArray[np.float16]) -> None:
    """What the extraction does; a shard is written only where none is."""
    path.unlink(missing_ok=True)
    write_shard(path.parent, path.name, layout, values.reshape(layout.shard), pool)


def through_zarr(array: "zarr.Array[Any]", path: Path, values: NDArray[np.float16]) -> None:
    """The first sample of an array of our layout."""
    array[0, 0] = values
    fsync_file(path)


def then_fsync(save: Write, path: Path, values: NDArray[np.float16]) -> None:
    """Another format, made durable."""
    save(path, values)
    fsync_file(path)


def ways(folder: Path, grid: int, channels: int, pool: ThreadPoolExecutor) -> dict[str, Write]:
    """How each format writes one sample."""
    for name, data in split_files(manifest(1, grid, channels), "train").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    inside = folder / "train.zarr/hidden_states"
    layout = parse_layout((inside / "zarr.json").read_bytes())
    assert layout is not None
    array = zarr.open_array(inside, mode="r+")
    shard = inside / "c.0.0.0.0.0.0.0"

    def tensors(path: Path, values: NDArray[np.float16]) -> None:
        save_file({f"{t}.{x}": values[t, x] for t in range(4) for x in range(4)}, path)

    return {
        BOUND: lambda path, values: bound(layout, pool, path, values),
        OURS: lambda path, values: ours(layout, pool, path, values),
        ZARR: lambda path, values: through_zarr(array, shard, values),
        TENSORS: partial(then_fsync, tensors),
        ARRAYS: partial(then_fsync, lambda path, values: np.save(path, values)),
    }


def peak_memory(work: Callable[[], object]) -> float:
    """MiB that Python allocates beyond what there was."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / 1024**2


def main() -> None:
    """Read the command line, measure, print."""
    asked = command_line((__doc__ or "").splitlines()[0]).parse_args()
    threads = os.cpu_count() or 1
    schema = manifest(1, asked.grid, asked.channels).schema
    samples = [features(schema, number) for number in range(asked.samples)]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(threads) as pool:
        each = ways(Path(name), asked.grid, asked.channels, pool)

        def all_samples(write: Write) -> None:
            for number, values in enumerate(samples):
                write(Path(name) / f"{number}.npy", values)

        taken = interleaved({way: partial(all_samples, write) for way, write in each.items()}, asked.rounds)
        memory = {
            way: peak_memory(partial(write, Path(name) / "0.npy", samples[0])) for way, write in each.items()
        }
    raw = sum(values.nbytes for values in samples)
    lines = [f"# Writing hidden states, {time.strftime('%Y-%m-%d')}", "", surroundings(threads), ""]
    lines += [
        f"{asked.samples} samples of 4 x 4 maps of {asked.grid} x {asked.grid} x {asked.channels} float16;"
    ]
    lines += [
        f"{asked.rounds} interleaved rounds, median (interquartile range). Memory is what Python allocates"
    ]
    lines += [
        "beyond the sample itself.",
        "",
        "| | MB/s | share of the bound | memory | |",
        "|---|---|---|---|---|",
    ]
    for way, seconds in taken.items():
        share, speed = ratios(seconds, taken[BOUND]), megabytes_a_second(raw, seconds)
        lines.append(f"| {way} | {speed} | {share} | {memory[way]:.0f} MiB | {NOTES[way]} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if asked.out:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
