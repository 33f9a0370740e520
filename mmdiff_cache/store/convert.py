"""Another store from one that is there, without the backbone: less of it, or encoded in another way.

What is kept is copied value by value and sample by sample through the same writer that extraction uses, so
the result is an ordinary store: it can be interrupted, gone on with, verified, repaired and converted again.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.config import Codec
from mmdiff_cache.errors import ConfigError, StorageRefused
from mmdiff_cache.records import FeatureBatch, PreparedSample, Progress

from .concepts import concept_maps, map_blocks
from .label_writer import open_label_writer
from .manifest import MANIFEST, Manifest
from .partition import PartitionWriter
from .quantise import stored_as
from .reader import Store, open_store
from .schema import LabelArray, StoreSchema, estimated_bytes
from .split import SplitReader
from .writer import open_writer

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What of a store is kept, in the order of the store; None keeps all."""

    splits: Sequence[str] | None = None
    layers: Sequence[str] | None = None
    timesteps: Sequence[float] | None = None
    variants: Sequence[int] | None = None
    """By position."""
    discriminative: Sequence[str] | None = None
    """Encoders, by name; an empty list keeps none."""
    limit: int | None = None
    """The first N samples of every split."""
    codec: Codec | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """A conversion that was worked out, before anything is written."""

    source: Store
    target: Path
    manifest: Manifest
    layers: tuple[str, ...]
    timesteps: tuple[float, ...]
    variants: tuple[int, ...]
    stored_bytes: int
    """Estimated, on disk."""

    def __str__(self) -> str:
        schema = self.manifest.schema
        counts = ", ".join(f"{split} {len(ids):,}" for split, ids in self.manifest.splits.items())
        steps = " ".join(f"{t:g}" for t in schema.timesteps)
        return "\n".join(
            [
                f"from       {self.source.path} ({self.source.disk_bytes / 1e6:,.1f} MB)",
                f"to         {self.target} (at most {self.stored_bytes / 1e6:,.1f} MB)",
                f"samples    {counts}",
                f"layers     {' '.join(schema.layers)}",
                f"timesteps  {steps}",
                f"encoders   {' '.join(encoder.name for encoder in schema.discriminative) or 'none'}",
                f"codec      {schema.codec}",
            ]
        )


def plan_conversion(
    source: str | os.PathLike[str], target: str | os.PathLike[str], selection: Selection
) -> Conversion:
    """Work out a conversion. Raises ConfigError for what the source does not hold."""
    store, root = open_store(source), Path(target).absolute()
    if root == store.path.absolute():
        raise ConfigError(f"{root} cannot be converted into itself; give another folder")
    stored = store.manifest
    splits = _kept("split", tuple(stored.splits), selection.splits)
    reader = store[splits[0]]
    layers = _kept("layer", stored.schema.layers, selection.layers)
    timesteps = tuple(
        stored.schema.timesteps[n]
        for n in sorted({reader.timestep_index(t) for t in selection.timesteps or reader.timesteps})
    )
    positions = tuple(range(len(stored.schema.variants)))
    variants = _kept("variant", positions, selection.variants)
    if not stored.identity["noise"].get("shared", True) and timesteps != reader.timesteps[: len(timesteps)]:
        raise ConfigError(
            f"timestep number j of {store.path} has noise draw j (noise.shared is off), so only timesteps "
            "from the end of its list can be left out"
        )
    encoders = _kept("encoder", tuple(reader.discriminative), selection.discriminative)
    codec = selection.codec or stored.schema.codec
    if stored.schema.codec == "int8" != codec:
        raise ConfigError(f"{store.path} is int8: what was rounded away cannot come back with codec {codec}")
    schema = replace(
        stored.schema.extracted,
        layers=layers,
        timesteps=timesteps,
        variants=tuple(stored.schema.variants[n] for n in variants),
        discriminative=tuple(e for e in stored.schema.discriminative if e.name in encoders),
        codec=codec,
    )
    manifest = _manifest(store, schema, {split: stored.splits[split][: selection.limit] for split in splits})
    return Conversion(
        source=store,
        target=root,
        manifest=manifest,
        layers=layers,
        timesteps=timesteps,
        variants=variants,
        stored_bytes=sum(estimated_bytes(schema, len(ids)) for ids in manifest.splits.values()),
    )


def convert(conversion: Conversion, progress: Progress | None = None) -> Store:
    """Write the planned store. Safe to run again, and to interrupt.

    Raises StoreIncomplete or DamageError, naming the sample, where the source cannot be read.
    """
    total = sum(map(len, conversion.manifest.splits.values()))
    with open_writer(conversion.target, conversion.manifest) as writer:
        pending = [p for split in conversion.manifest.splits for p in writer.pending(split)]
        done = total - sum(partition.size for partition in pending)
        _check_disk(conversion, done / total)
        for partition in pending:
            with writer.begin(partition) as out:
                for offset in range(partition.size):
                    _copy(conversion, conversion.source[partition.split], out, offset)
                    done += 1
                    if progress is not None:
                        progress(done, total, partition.split)
                out.commit()
    for label in conversion.source.manifest.schema.labels:
        if label.added:
            _copy_labels(conversion, label)
    return open_store(conversion.target)


def _copy_labels(conversion: Conversion, label: LabelArray) -> None:
    """A label set that was added to the source, as far as it goes there."""
    name = label.spec.name
    with open_label_writer(conversion.target, label) as writer:
        for split in conversion.manifest.splits:
            reader = conversion.source[split]
            entries = dict(enumerate(reader.label_entries(name)))
            for partition in writer.pending(split):
                if partition.stop > len(entries):
                    continue
                with writer.begin(partition) as out:
                    for offset in range(partition.size):
                        position = partition.start + offset
                        entry = entries[position]
                        if entry.state == "failed" or position in reader.failed:
                            out.fail(offset, entry.reason or "the sample failed")
                            continue
                        at_network_size = reader.labels(name, [position])[0]
                        original = reader.original_label(name, position)
                        out.write(offset, at_network_size, original, entry.content_hash or "")
                    out.commit()


def _kept(what: str, stored: tuple[T, ...], asked: Sequence[T] | None) -> tuple[T, ...]:
    """What is asked for, in stored order."""
    for name in asked or ():
        if name not in stored:
            raise ConfigError(f"{what} {name!r} is not stored; stored: {', '.join(map(str, stored))}")
    return tuple(name for name in stored if asked is None or name in asked)


def _manifest(store: Store, schema: StoreSchema, samples: Mapping[str, tuple[str, ...]]) -> Manifest:
    """The manifest of the result: the identity stays, unless values change; its parent is named."""
    stored = store.manifest
    digest = hashlib.sha256((store.path / MANIFEST).read_bytes()).hexdigest()
    parent = {"fingerprint": stored.fingerprint, "manifest_sha256": digest}
    return Manifest(
        identity={**stored.identity, **stored_as(schema.codec)},
        schema=schema,
        splits=samples,
        provenance={**stored.provenance, "parent": parent},
        config=_config(stored, schema, samples),
    )


def _config(stored: Manifest, schema: StoreSchema, samples: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The configuration with which an extraction would give the result: repair goes by it."""
    config = dict(stored.config)
    cut = any(len(ids) < len(stored.splits[split]) for split, ids in samples.items())
    changes = {
        "layers": list(schema.layers),
        "timesteps": list(schema.timesteps),
        "splits": list(samples),
        "codec": schema.codec,
        "discriminative": _encoders(stored, schema),
        "limit": max(map(len, samples.values())) if cut else config.get("limit"),
    }
    return config | {name: value for name, value in changes.items() if name in config}


def _encoders(stored: Manifest, schema: StoreSchema) -> list[str]:
    """The encoders that are kept as the configuration calls them: by name or folder, in stored order."""
    kept = [encoder in schema.discriminative for encoder in stored.schema.discriminative]
    return [name for name, keep in zip(stored.config.get("discriminative", ()), kept, strict=False) if keep]


def _check_disk(conversion: Conversion, done: float) -> None:
    needed, free = conversion.stored_bytes * (1 - done), shutil.disk_usage(conversion.target).free
    if needed > free:
        raise StorageRefused(
            f"{conversion.target} needs up to {needed / 1e6:,.0f} MB more, its disk has {free / 1e6:,.0f} MB "
            "free; keep fewer layers, timesteps or samples, or choose another disk"
        )


def _copy(conversion: Conversion, reader: SplitReader, out: PartitionWriter, offset: int) -> None:
    """One sample from the source to its slot; a failed one stays failed, with its reason."""
    position = out.partition.start + offset
    sample_id = reader.ids[position]
    if position in reader.failed:
        out.fail(offset, sample_id, reader.failed[position])
        return
    out.write(offset, [_sample(reader, position)], _features(conversion, reader, position))


def _sample(reader: SplitReader, position: int) -> PreparedSample:
    names = [name for name in reader.label_specs if name not in reader.added_labels]
    return PreparedSample(
        sample_id=reader.ids[position],
        image=reader.images([position])[0],
        prompt=reader.prompts([position])[0],
        labels={name: reader.labels(name, [position])[0] for name in names},
        original_labels={name: reader.original_label(name, position) for name in names},
        content_hash=reader.content_hash(position),
        generation_seed=int(reader.generation_seeds([position])[0]) if reader.drawn else None,
    )


def _features(conversion: Conversion, reader: SplitReader, position: int) -> FeatureBatch:
    """What is kept of one sample's features. Maps of fewer timesteps are taken anew, from the scores."""
    schema, chosen = conversion.source.manifest.schema, list(conversion.variants)
    timesteps, layers = conversion.timesteps, conversion.layers
    whole = len(timesteps) == len(reader.timesteps)
    scores: dict[str, NDArray[np.float32]] = {}
    maps: dict[str, NDArray[np.float32]] = {}
    for name in reader.vocabularies:
        per_variant = [reader.concept_scores(name, [position], timesteps, variant)[0] for variant in chosen]
        scores[name] = np.stack(per_variant)[None]
        if whole:
            maps[name] = np.stack([reader.concept_maps(name, [position], v)[0] for v in chosen])[None]
        else:
            maps[name] = concept_maps(scores[name][0], map_blocks(schema, name))[None]
    hidden = [reader.hidden_states([position], timesteps, layers, variant)[0] for variant in chosen]
    kept = np.ix_(
        [0],
        chosen,
        [reader.timestep_index(t) for t in timesteps],
        [reader.layer_index(layer) for layer in layers],
    )
    return FeatureBatch(
        hidden_states=np.stack(hidden)[None],
        concept_scores=scores,
        concept_maps=maps,
        latents=reader.latents([position]),
        audit=reader.audit([position])[kept],
        discriminative={
            encoder.name: np.stack(
                [reader.discriminative_features(encoder.name, [position], v)[0] for v in chosen]
            )[None]
            for encoder in conversion.manifest.schema.discriminative
        },
        sigmas=reader.sigmas([position])[:, kept[2].ravel()] if reader.drawn else None,
    )
