"""What a store holds, as plain values: for `inspect`, its JSON, and the short text of `str(store)`."""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.errors import StoreError
from mmdiff_cache.records import STATISTICS, LabelSpec

from .arrays import ArraySpec
from .manifest import MANIFEST, Manifest, flatten
from .reader import SplitReader, Store, open_store
from .schema import raw_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitStates:
    """How many samples of a split are planned, done, failed, and neither; failures by sample id."""

    planned: int
    done: int
    failed: int
    pending: int
    reasons: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySummary:
    """One array, summed over the splits; `shape` is that of the first split."""

    path: str
    dtype: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    shard: tuple[int, ...] | None
    codec: str
    disk_bytes: int
    raw_bytes: int
    """Uncompressed bytes of the finished part; 0 for text."""

    @property
    def ratio(self) -> float | None:
        """Raw to stored bytes; None while nothing is stored."""
        return self.raw_bytes / self.disk_bytes if self.disk_bytes and self.raw_bytes else None


@dataclass(frozen=True, kw_only=True, slots=True)
class MapStatistics:
    """The range audit of one (timestep, layer), over all finished samples and variants of all splits."""

    timestep: float
    layer: str
    mean: float
    rms: float
    max_abs: float
    entropy: float
    """Nats; mean over maps."""
    clipped: int
    flushed: int
    non_finite: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelStatistics:
    """What a label set holds, from the maps at network size of the first samples of a split."""

    name: str
    kind: str
    split: str
    samples: int
    shares: Mapping[str, float]
    """Share of pixels a class; `ignored` is the share that counts for nothing."""
    low: float | None = None
    """Smallest valid depth, metres."""
    mean: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSummary:
    """Everything `inspect STORE` shows."""

    path: str
    identity: Mapping[str, Any]
    """Dotted names and plain values."""
    provenance: Mapping[str, Any]
    layers: tuple[str, ...]
    timesteps: tuple[float, ...]
    variants: int
    vocabularies: Mapping[str, tuple[str, ...]]
    discriminative: Mapping[str, tuple[str, ...]]
    """Blocks of each discriminative encoder."""
    splits: Mapping[str, SplitStates]
    arrays: tuple[ArraySummary, ...]
    maps: tuple[MapStatistics, ...]
    labels: tuple[LabelStatistics, ...]
    disk_bytes: int
    raw_bytes: int
    """Uncompressed bytes of what is finished."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreEntry:
    """One line of `inspect` without arguments."""

    path: str
    dataset: str
    backbone: str
    splits: tuple[str, ...]
    layers: int
    timesteps: int
    planned: int
    done: int
    failed: int
    disk_bytes: int
    raw_bytes: int
    age_seconds: float
    """Since the manifest was written, by the clock of this machine."""
    fault: str | None = None
    """Why the store cannot be opened; everything else is then empty."""


def summarize(store: Store, label_samples: int = 256) -> StoreSummary:
    """Summarise a store. Reads its audit, and the label maps of up to `label_samples` samples a split."""
    readers = [store[split] for split in store.splits]
    schema = store.manifest.schema
    arrays = tuple(_array(specs, readers) for specs in zip(*(r.array_specs for r in readers), strict=True))
    return StoreSummary(
        path=str(store.path),
        identity=dict(flatten(store.manifest.identity)),
        provenance=dict(flatten(store.manifest.provenance)),
        layers=schema.layers,
        timesteps=schema.timesteps,
        variants=len(schema.variants),
        vocabularies=readers[0].vocabularies,
        discriminative={encoder.name: encoder.layers for encoder in schema.discriminative},
        splits={reader.split: _states(reader) for reader in readers},
        arrays=arrays,
        maps=_maps(readers),
        labels=tuple(
            _label(reader, spec, labelled[:label_samples])
            for reader in readers
            for spec in reader.label_specs.values()
            if (labelled := [n for n in reader.finished if reader.state(n, spec.name) == "done"])
        ),
        disk_bytes=store.disk_bytes,
        raw_bytes=_finished_bytes(store),
    )


def find_stores(root: str | os.PathLike[str]) -> list[StoreEntry]:
    """Every store under a folder, sorted by path. One that cannot be opened is listed with the reason."""
    found: list[StoreEntry] = []
    for folder, subfolders, names in os.walk(root):
        if MANIFEST in names:
            subfolders.clear()
            found.append(_entry(Path(folder)))
        subfolders[:] = sorted(name for name in subfolders if not name.endswith(".zarr"))
    return found


def short_text(store: Store) -> str:
    """A few lines for `print(store)`."""
    schema = store.manifest.schema
    raw, disk = _finished_bytes(store), store.disk_bytes
    steps = ", ".join(f"{t:g}" for t in schema.timesteps)
    grid = f"{schema.grid[0]} x {schema.grid[1]} x {schema.channels}"
    lines = [f"store {store.path}: {_words(store.manifest)}"]
    for split in store.splits:
        reader = store[split]
        failed = f", {len(reader.failed)} failed" if reader.failed else ""
        lines.append(f"  {split}: {len(reader.finished)} of {len(reader)} samples{failed}")
    dtype = "int8" if schema.codec == "int8" else "float16"
    lines.append(f"  {_count(schema.layers, 'layer')} ({', '.join(schema.layers)}) of {grid} {dtype}")
    lines.append(f"  {_count(schema.timesteps, 'timestep')} ({steps})")
    lines += [f"  concepts {words.name}: {', '.join(words.concepts)}" for words in schema.vocabularies]
    if schema.cross_attention:
        lines.append(f"  cross-attention of {', '.join(schema.cross_attention)}")
    lines += [f"  discriminative {encoder}" for encoder in schema.discriminative]
    if schema.labels:
        lines.append(f"  labels {', '.join(f'{x.spec.name} ({x.spec.kind})' for x in schema.labels)}")
    lines.append(f"  {disk / 1e6:,.1f} MB on disk, {raw / 1e6:,.1f} MB raw")
    return "\n".join(lines)


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun}{'s' if len(items) > 1 else ''}"


def _words(manifest: Manifest) -> str:
    """Data set and backbone as the configuration and provenance name them."""
    dataset = manifest.config.get("dataset", "?")
    backbone = manifest.provenance.get("backbone") or manifest.config.get("backbone", "?")
    return f"{dataset} through {backbone}"


def _finished_bytes(store: Store) -> int:
    """Bytes of the finished samples before any codec."""
    return sum(raw_bytes(store.manifest.schema, len(store[split].finished)) for split in store.splits)


def _states(reader: SplitReader) -> SplitStates:
    done, failed = len(reader.finished), reader.failed
    return SplitStates(
        planned=len(reader),
        done=done,
        failed=len(failed),
        pending=len(reader) - done - len(failed),
        reasons={reader.ids[sample]: reason for sample, reason in failed.items()},
    )


def _array(specs: Sequence[ArraySpec], readers: Sequence[SplitReader]) -> ArraySummary:
    first, disk, raw = specs[0], 0, 0
    for spec, reader in zip(specs, readers, strict=True):
        folder = f"{reader.split}.zarr/{spec.path}/"
        if spec.reach == "array":
            disk += (reader.path / spec.path / "c.0").stat().st_size
            raw += spec.nbytes
        else:
            disk += sum(entry.size for entry in reader.files if entry.path.startswith(folder))
            raw += spec.nbytes // spec.shape[0] * len(reader.finished)
    return ArraySummary(
        path=first.path,
        dtype=first.dtype,
        dims=first.dims,
        shape=first.shape,
        chunk=first.chunk,
        shard=first.shard,
        codec=readers[0].codec(first.path),
        disk_bytes=disk,
        raw_bytes=raw,
    )


def _maps(readers: Sequence[SplitReader]) -> tuple[MapStatistics, ...]:
    """Means and sums over samples and variants, a (timestep, layer) each."""
    audit = np.concatenate([reader.audit() for reader in readers]).astype(np.float64)
    if not len(audit):
        return ()
    values = {name: audit[..., number] for number, name in enumerate(STATISTICS)}
    return tuple(
        MapStatistics(
            timestep=timestep,
            layer=layer,
            mean=float(values["mean"][:, :, t, n].mean()),
            rms=float(np.sqrt((values["rms"][:, :, t, n] ** 2).mean())),
            max_abs=float(values["max_abs"][:, :, t, n].max()),
            entropy=float(values["entropy"][:, :, t, n].mean()),
            clipped=int(values["clipped"][:, :, t, n].sum()),
            flushed=int(values["flushed"][:, :, t, n].sum()),
            non_finite=int(values["non_finite"][:, :, t, n].sum()),
        )
        for t, timestep in enumerate(readers[0].timesteps)
        for n, layer in enumerate(readers[0].layers)
    )


def _label(reader: SplitReader, spec: LabelSpec, samples: Sequence[int]) -> LabelStatistics:
    if spec.kind == "depth":
        return _depth(reader, spec, samples)
    counts = np.zeros(256, np.int64)
    for run in _batches(samples):
        counts += np.bincount(reader.labels(spec.name, run).ravel(), minlength=256)
    names = spec.classes or ("outside", "inside")
    shares = {name: float(counts[number] / counts.sum()) for number, name in enumerate(names)}
    if spec.ignore is not None:
        shares["ignored"] = float(counts[spec.ignore] / counts.sum())
    return LabelStatistics(
        name=spec.name, kind=spec.kind, split=reader.split, samples=len(samples), shares=shares
    )


def _batches(samples: Sequence[int], size: int = 16) -> list[Sequence[int]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _depth(reader: SplitReader, spec: LabelSpec, samples: Sequence[int]) -> LabelStatistics:
    """Range and mean of the depths that count: those that are finite and in the valid range."""
    low, high, total, valid, pixels = np.inf, -np.inf, 0.0, 0, 0
    least, most = spec.valid_range or (-np.inf, np.inf)
    for run in _batches(samples):
        depth: NDArray[np.float32] = reader.labels(spec.name, run)
        inside = depth[np.isfinite(depth) & (depth >= least) & (depth <= most)]
        pixels, valid = pixels + depth.size, valid + inside.size
        total += float(inside.sum(dtype=np.float64))
        if inside.size:
            low, high = min(low, float(inside.min())), max(high, float(inside.max()))
    return LabelStatistics(
        name=spec.name,
        kind=spec.kind,
        split=reader.split,
        samples=len(samples),
        shares={"ignored": 1 - valid / pixels},
        low=low if valid else None,
        mean=total / valid if valid else None,
        high=high if valid else None,
    )


def _entry(path: Path) -> StoreEntry:
    age = time.time() - (path / MANIFEST).stat().st_mtime
    try:
        store = open_store(path)
    except StoreError as error:
        return StoreEntry(
            path=str(path), dataset="", backbone="", splits=(), layers=0, timesteps=0,
            planned=0, done=0, failed=0, disk_bytes=0, raw_bytes=0, age_seconds=age, fault=str(error),
        )  # fmt: skip
    manifest = store.manifest
    return StoreEntry(
        path=str(path),
        dataset=str(manifest.config.get("dataset", "?")),
        backbone=str(manifest.provenance.get("backbone") or manifest.config.get("backbone", "?")),
        splits=store.splits,
        layers=len(manifest.schema.layers),
        timesteps=len(manifest.schema.timesteps),
        planned=store.samples_planned,
        done=store.samples_done,
        failed=store.samples_failed,
        disk_bytes=store.disk_bytes,
        raw_bytes=_finished_bytes(store),
        age_seconds=age,
    )
