"""Writing hidden states durably, against the bound: compress the same chunks, write and fsync the same bytes.

    python benchmarks/bench_write.py [--samples 6] [--rounds 7] [--out benchmarks/results/NAME.md]

All ways write the same samples, a file each, in the same process, interleaved, on an otherwise idle machine.
HDF5 takes part where h5py is installed.
"""

import hashlib
import importlib
import importlib.util
import os
import tempfile
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from rounds import command_line, features, heading, interleaved, manifest, megabytes_a_second, publish, ratios
from safetensors.numpy import save_file

from mmdiff_cache.store.files import fsync_file
from mmdiff_cache.store.metadata import split_files
from mmdiff_cache.store.shard_writer import write_shard
from mmdiff_cache.store.shards import ShardLayout, blosc, parse_layout
from mmdiff_cache.store.threads import codec_pool

BOUND, OURS, ZARR = "compression and one durable write (the bound)", "mmdiff-cache", "zarr-python, then fsync"
HASHED = "the same, with SHA-256 of the file"
TENSORS, ARRAYS, HDF5 = "safetensors, then fsync", "npy, then fsync", "HDF5, chunked, then fsync"
PROMISES = {
    BOUND: ("none", ""),
    HASHED: ("SHA-256", ""),
    OURS: ("crc32c, SHA-256", "yes"),
    ZARR: ("crc32c", "no: absent reads as fill"),
    TENSORS: ("none", "no"),
    ARRAYS: ("none", "no"),
    HDF5: ("fletcher32", "no"),
}
"""Checksum of the values, and whether an interrupted run can go on from what is there."""
h5py: Any = importlib.import_module("h5py") if importlib.util.find_spec("h5py") else None
Write = Callable[[Path, NDArray[np.float16]], object]


def bound(
    layout: ShardLayout, pool: Executor, path: Path, values: NDArray[np.float16], *, hashed: bool = False
) -> None:
    """All chunks compressed by threads, written in one go."""
    digest = hashlib.sha256()

    def packed(chunk: NDArray[np.float16]) -> bytes:
        return blosc.compress(chunk, layout.compressor.encode(), layout.level, layout.shuffle, layout.block)

    with open(path, "wb", buffering=0) as file:
        for data in pool.map(packed, values.reshape(-1, *layout.chunk[4:])):
            file.write(data)
            if hashed:
                digest.update(data)
        os.fsync(file.fileno())


def ours(layout: ShardLayout, pool: Executor, path: Path, values: NDArray[np.float16]) -> None:
    """What the extraction does; a shard is written only where none is."""
    path.unlink(missing_ok=True)
    write_shard(path.parent, path.name, layout, values.reshape(layout.shard), pool)


def through_zarr(array: "zarr.Array[Any]", shard: Path, path: Path, values: NDArray[np.float16]) -> None:
    """The first sample of an array of our layout, made durable and put in its place."""
    array[0, 0] = values
    fsync_file(shard)
    shard.replace(path)


def then_fsync(save: Write, path: Path, values: NDArray[np.float16]) -> None:
    """Another format, made durable."""
    save(path, values)
    fsync_file(path)


def ways(folder: Path, grid: int, channels: int, pool: Executor) -> dict[str, Write]:
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

    def hdf5(path: Path, values: NDArray[np.float16]) -> None:
        with h5py.File(path, "w") as file:
            file.create_dataset("maps", data=values, chunks=(1, 1, *values.shape[2:]), fletcher32=True)

    return {
        BOUND: lambda path, values: bound(layout, pool, path, values),
        HASHED: lambda path, values: bound(layout, pool, path, values, hashed=True),
        OURS: lambda path, values: ours(layout, pool, path, values),
        ZARR: lambda path, values: through_zarr(array, shard, path, values),
        TENSORS: partial(then_fsync, tensors),
        ARRAYS: partial(then_fsync, lambda path, values: np.save(path, values)),
        **({HDF5: partial(then_fsync, hdf5)} if h5py else {}),
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
    schema = manifest(1, asked.grid, asked.channels).schema
    samples = [features(schema, number) for number in range(asked.samples)]
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "0.npy"
        each = ways(Path(name), asked.grid, asked.channels, codec_pool())

        def all_samples(write: Write) -> None:
            for number, values in enumerate(samples):
                write(file.with_stem(str(number)), values)

        taken = interleaved({way: partial(all_samples, write) for way, write in each.items()}, asked.rounds)
        memory: dict[str, float] = {}
        disk: dict[str, int] = {}
        for way, write in each.items():
            memory[way] = peak_memory(partial(write, file, samples[0]))
            disk[way] = file.stat().st_size
    raw = samples[0].nbytes
    lines = heading("Writing hidden states", asked)
    lines += ["Memory is what Python allocates beyond the sample itself.", ""]
    lines.append("| | MB/s | share of the bound | memory | on disk | checksum | resumable |")
    lines.append("|---|---|---|---|---|---|---|")
    for way, seconds in taken.items():
        share, speed = ratios(seconds, taken[BOUND]), megabytes_a_second(raw * asked.samples, seconds)
        kept, (checksum, resumable) = f"{memory[way]:.0f} MiB | {disk[way] / raw:.2f} of raw", PROMISES[way]
        lines.append(f"| {way} | {speed} | {share} | {kept} | {checksum} | {resumable} |")
    publish(lines, asked.out)


if __name__ == "__main__":
    main()
