"""Reading hidden states, against the bound of the same bytes: raw file reads and raw decompression.

    python benchmarks/bench_read.py [--samples 6] [--rounds 7] [--out benchmarks/results/NAME.md]

All ways read the same samples in the same process, interleaved, on an otherwise idle machine, into memory
that is reused. HDF5 takes part where h5py is installed.
"""

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from rounds import (
    batch,
    command_line,
    features,
    heading,
    interleaved,
    manifest,
    megabytes_a_second,
    publish,
    ratios,
)
from safetensors import safe_open
from safetensors.numpy import save_file

from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.shards import CHECKSUM_BYTES, blosc, decode_index, parse_layout
from mmdiff_cache.store.threads import codec_pool
from mmdiff_cache.store.writer import open_writer

BOUND, OURS, ZARR = "raw reads and decompression (the bound)", "mmdiff-cache", "zarr-python"
TENSORS, ARRAYS, HDF5 = "safetensors", "npy, memory map", "HDF5, chunked"
SHARDS = "store/**/c.*"
FILES = {BOUND: SHARDS, OURS: SHARDS, ZARR: SHARDS, TENSORS: "*.safetensors", ARRAYS: "*.npy", HDF5: "*.h5"}
"""Files of each way, whose size is shown."""
PROMISES = {
    BOUND: ("not looked at", ""),
    OURS: ("crc32c", "yes"),
    ZARR: ("crc32c", "no: absent reads as fill"),
    TENSORS: ("none", "no"),
    ARRAYS: ("none", "no"),
    HDF5: ("fletcher32", "no"),
}
"""Checksum of the values, and whether an interrupted run can go on from what is there."""
ONE = (1, 2)
"""Timestep and layer of the one map that is read alone."""
MAPS = [(t, layer) for t in range(4) for layer in range(4)]
Fill = Callable[[int, NDArray[np.float16]], object]
"""Fill memory with one sample, or with one map of it."""
h5py: Any = importlib.import_module("h5py") if importlib.util.find_spec("h5py") else None


def write_all(folder: Path, samples: int, grid: int, channels: int) -> None:
    """The same samples in every format, a file a sample."""
    plan = manifest(samples, grid, channels)
    with open_writer(folder / "store", plan) as writer, writer.begin(writer.pending("train")[0]) as partition:
        for number, sample_id in enumerate(plan.splits["train"]):
            values = features(plan.schema, number)
            partition.write(number, *batch(plan.schema, sample_id, values))
            np.save(folder / f"{number}.npy", values)
            save_file({f"{t}.{x}": values[t, x] for t, x in MAPS}, folder / f"{number}.safetensors")
            if h5py:
                with h5py.File(folder / f"{number}.h5", "w") as file:
                    chunk = (1, 1, *values.shape[2:])
                    file.create_dataset("maps", data=values, chunks=chunk, fletcher32=True)
        partition.commit()


class Bound:
    """Every chunk with one pread and one decompression, in as many threads as ours."""

    def __init__(self, store: Path, samples: int) -> None:
        array = store / "train.zarr/hidden_states"
        layout = parse_layout((array / "zarr.json").read_bytes())
        assert layout is not None
        shards = [array / f"c.{n}.0.0.0.0.0.0" for n in range(samples)]
        contents = [path.read_bytes() for path in shards]
        size = layout.index_bytes
        self._places = [decode_index(layout, data[-size:], len(data)) for data in contents]
        self._files = [os.open(path, os.O_RDONLY) for path in shards]

    def read(self, out: NDArray[np.float16]) -> None:
        """Fill [B T L h w C]."""
        chunks = [(n, t, x) for n in range(len(self._files)) for t, x in MAPS]
        list(codec_pool().map(self._one, [out[chunk] for chunk in chunks], *zip(*chunks, strict=True)))

    def read_one(self, out: NDArray[np.float16]) -> None:
        """Fill [B h w C] with the map ONE of every sample."""
        list(codec_pool().map(self._one, out, range(len(out)), repeat(ONE[0]), repeat(ONE[1])))

    def _one(self, out: NDArray[np.float16], number: int, step: int, layer: int) -> None:
        offset, length = (int(x) for x in self._places[number][4 * step + layer])
        packed: Any = os.pread(self._files[number], length - CHECKSUM_BYTES, offset)
        blosc.decompress(packed, out)


def others(folder: Path) -> tuple[dict[str, Fill], dict[str, Fill]]:
    """How other libraries read all maps of a sample, and one map of it."""
    array = zarr.open_array(folder / "store/train.zarr/hidden_states", mode="r")

    def by_zarr(n: int, out: NDArray[np.float16]) -> None:
        out[...] = array[n, 0]

    def one_by_zarr(n: int, out: NDArray[np.float16]) -> None:
        out[...] = array[n, 0, *ONE]

    def tensors(n: int, out: NDArray[np.float16]) -> None:
        with safe_open(folder / f"{n}.safetensors", "numpy") as file:
            for t, x in MAPS:
                out[t, x] = file.get_tensor(f"{t}.{x}")

    def one_tensor(n: int, out: NDArray[np.float16]) -> None:
        with safe_open(folder / f"{n}.safetensors", "numpy") as file:
            out[...] = file.get_tensor(f"{ONE[0]}.{ONE[1]}")

    def mapped(n: int, out: NDArray[np.float16]) -> None:
        out[...] = np.load(folder / f"{n}.npy", mmap_mode="r")

    def one_mapped(n: int, out: NDArray[np.float16]) -> None:
        out[...] = np.load(folder / f"{n}.npy", mmap_mode="r")[ONE]

    def hdf5(n: int, out: NDArray[np.float16]) -> None:
        with h5py.File(folder / f"{n}.h5") as file:
            file["maps"].read_direct(out)

    def one_hdf5(n: int, out: NDArray[np.float16]) -> None:
        with h5py.File(folder / f"{n}.h5") as file:
            file["maps"].read_direct(out, np.s_[ONE])

    whole: dict[str, Fill] = {ZARR: by_zarr, TENSORS: tensors, ARRAYS: mapped}
    single: dict[str, Fill] = {ZARR: one_by_zarr, TENSORS: one_tensor, ARRAYS: one_mapped}
    return whole | ({HDF5: hdf5} if h5py else {}), single | ({HDF5: one_hdf5} if h5py else {})


def ways(folder: Path, samples: int) -> dict[str, dict[str, Callable[[], object]]]:
    """How each format is read: all maps of all samples, and one map of each."""
    reader = open_store(folder / "store")["train"]
    bound, everyone = Bound(folder / "store", samples), range(samples)
    whole = np.empty((samples, 4, 4, *reader.grid, reader.channels), np.float16)
    single = np.empty((samples, *reader.grid, reader.channels), np.float16)
    step, layer = reader.timesteps[ONE[0]], reader.layers[ONE[1]]

    def each(out: NDArray[np.float16], fill: Fill) -> Callable[[], object]:
        return lambda: [fill(n, out[n]) for n in everyone]

    all_maps, one_map = others(folder)
    return {
        "all 16 maps of a sample": {
            BOUND: lambda: bound.read(whole),
            OURS: lambda: reader.hidden_states(everyone, out=whole),
            **{name: each(whole, fill) for name, fill in all_maps.items()},
        },
        "one map of the 16": {
            BOUND: lambda: bound.read_one(single),
            OURS: lambda: reader.hidden_states(everyone, [step], [layer], out=single[:, None, None]),
            **{name: each(single, fill) for name, fill in one_map.items()},
        },
    }


def main() -> None:
    """Read the command line, measure, print."""
    asked = command_line((__doc__ or "").splitlines()[0]).parse_args()
    lines = heading("Reading hidden states", asked)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_all(folder, asked.samples, asked.grid, asked.channels)
        raw = 32 * asked.samples * asked.grid**2 * asked.channels
        for title, each in ways(folder, asked.samples).items():
            taken = interleaved(each, asked.rounds)
            lines += [f"**{title}**", "", "| | MB/s | share of the bound | on disk | checksum | resumable |"]
            lines.append("|---|---|---|---|---|---|")
            for way, seconds in taken.items():
                speed = megabytes_a_second(raw if "all" in title else raw // 16, seconds)
                disk = sum(path.stat().st_size for path in folder.glob(FILES[way])) / raw
                checksum, resumable = PROMISES[way]
                share = ratios(seconds, taken[BOUND])
                lines.append(f"| {way} | {speed} | {share} | {disk:.2f} of raw | {checksum} | {resumable} |")
            lines.append("")
    publish(lines, asked.out)


if __name__ == "__main__":
    main()
