"""A synthetic source of features for store tests: random values of the right shapes, set by the sample id."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import numpy as np

from mmdiff_cache.records import STATISTICS, FeatureBatch, LabelSpec, PreparedSample
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.schema import Discriminative, LabelArray, StoreSchema, Variant, Vocabulary
from mmdiff_cache.store.writer import StoreWriter, open_writer

CLASSES = LabelSpec(name="classes", kind="classes", classes=("sky", "ground", "ball"), ignore=255)
DEPTH = LabelSpec(name="depth", kind="depth", valid_range=(0.5, 20.0))
MASK = LabelSpec(name="salient", kind="mask")
IDENTITY = {
    "backbone": {"name": "flux-tiny", "weights": "0" * 64},
    "dtype": "float32",
    "noise": {"form": "flow", "seed": 7, "shared": True},
}


def make_schema(**changes: object) -> StoreSchema:
    values: dict[str, object] = {
        "layers": ("double.1", "single.4"),
        "timesteps": (0.9, 0.26, 0.001),
        "grid": (2, 3),
        "channels": 8,
        "latent_channels": 4,
        "image_size": (8, 12),
        "variants": (Variant(), Variant(noise_draw=1, flipped=True)),
        "vocabularies": (
            Vocabulary(
                name="scenes",
                concepts=("sky", "ball"),
                blocks=("double.0", "double.1"),
                map_blocks=("double.1",),
            ),
            Vocabulary(name="depth", concepts=("near", "far"), blocks=("double.1",)),
        ),
        "discriminative": (
            Discriminative(
                name="dino", layers=("1", "4", "7"), grid=(1, 2), channels=5, weights_sha256="1" * 64
            ),
        ),
        "labels": (
            LabelArray(spec=CLASSES, canvas=(10, 14)),
            LabelArray(spec=DEPTH, canvas=(10, 14)),
            LabelArray(spec=MASK, canvas=(10, 14)),
        ),
        "partition_size": 4,
    }
    return StoreSchema(**{**values, **changes})  # type: ignore[arg-type]


def make_manifest(
    schema: StoreSchema | None = None, train: int = 6, test: int = 3, **changes: object
) -> Manifest:
    values: dict[str, object] = {
        "identity": IDENTITY,
        "schema": schema or make_schema(),
        "splits": {
            "train": tuple(f"train/{n:03d}" for n in range(train)),
            "test": tuple(f"test/é{n}" for n in range(test)),
        },
        "provenance": {"zarr": "3", "batch_size": 2},
        "config": {"dataset": "synthetic"},
    }
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


def generator(*words: object) -> np.random.Generator:
    digest = hashlib.sha256(repr(words).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def make_sample(schema: StoreSchema, sample_id: str) -> PreparedSample:
    random = generator("sample", sample_id)
    labels, originals = {}, {}
    for label in schema.labels:
        original = tuple(int(random.integers(1, side + 1)) for side in label.canvas)
        for target, shape in ((labels, schema.image_size), (originals, original)):
            if label.spec.kind == "depth":
                target[label.spec.name] = random.uniform(0.5, 20, shape).astype(np.float32)
            else:
                top = 2 if label.spec.kind == "mask" else len(label.spec.classes)
                target[label.spec.name] = random.integers(0, top, shape).astype(np.uint8)
    return PreparedSample(
        sample_id=sample_id,
        image=random.integers(0, 256, (*schema.image_size, 3)).astype(np.uint8),
        prompt=f"a picture of {sample_id}",
        labels=labels,
        original_labels=originals,
        content_hash=hashlib.sha256(sample_id.encode()).hexdigest(),
    )


def make_features(schema: StoreSchema, ids: list[str]) -> FeatureBatch:
    rows = [generator("features", sample_id) for sample_id in ids]
    v, t, steps = len(schema.variants), len(schema.timesteps), len(schema.layers)

    def draw(*shape: int, dtype: type = np.float32) -> np.ndarray:
        return np.stack([row.standard_normal(shape).astype(dtype) for row in rows])

    def shares(*shape: int) -> np.ndarray:
        powers = np.exp(draw(*shape))
        return powers / powers.sum(axis=2, keepdims=True)

    hidden_states = draw(v, t, steps, *schema.grid, schema.channels, dtype=np.float16)
    wide, axes = hidden_states.astype(np.float32), (-3, -2, -1)
    audit = np.abs(draw(v, t, steps, len(STATISTICS)))
    audit[..., STATISTICS.index("mean")] = wide.mean(axis=axes)
    audit[..., STATISTICS.index("rms")] = np.sqrt(np.square(wide).mean(axis=axes))
    audit[..., STATISTICS.index("max_abs")] = np.abs(wide).max(axis=axes)
    audit[..., STATISTICS.index("clipped") :] = 0
    return FeatureBatch(
        hidden_states=hidden_states,
        concept_scores={
            x.name: draw(v, t, len(x.blocks), len(x.concepts), *schema.grid) for x in schema.vocabularies
        },
        concept_maps={x.name: shares(v, len(x.concepts), *schema.grid) for x in schema.vocabularies},
        latents=draw(*schema.grid, schema.latent_channels),
        audit=audit,
        discriminative={
            x.name: draw(v, len(x.layers), *x.grid, x.channels, dtype=np.float16)
            for x in schema.discriminative
        },
    )


def write_partition(writer: StoreWriter, partition, batch: int = 2, failing: tuple[str, ...] = ()) -> None:
    schema, ids = writer.manifest.schema.extracted, writer.manifest.splits[partition.split]
    with writer.begin(partition) as target:
        for offset in range(0, partition.size, batch):
            names = list(
                ids[partition.start + offset : min(partition.start + offset + batch, partition.stop)]
            )
            bad = [n for n, name in enumerate(names) if name in failing]
            if bad:
                for n, name in enumerate(names):
                    if n in bad:
                        target.fail(offset + n, name, "cannot decode: truncated")
                    else:
                        target.write(offset + n, [make_sample(schema, name)], make_features(schema, [name]))
                continue
            target.write(offset, [make_sample(schema, name) for name in names], make_features(schema, names))
        target.commit()


def write_store(
    path: Path, manifest: Manifest, failing: tuple[str, ...] = (), backwards: bool = False
) -> None:
    """What an extraction does: everything that is pending, in order."""
    with open_writer(path, manifest) as writer:
        todo = [p for split in manifest.splits for p in writer.pending(split)]
        for partition in reversed(todo) if backwards else todo:
            write_partition(writer, partition, failing=failing)


def counted_files(root: Path) -> dict[str, bytes]:
    """The files whose bytes are promised: groups, records and manifest."""
    found = [root / "manifest.json", *(root / "partitions").rglob("*")]
    for group in root.glob("*.zarr"):
        found += group.rglob("*")
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(found) if p.is_file()}


class _Killed(BaseException):
    """A process that ends between two steps."""


@contextmanager
def ended_at_rename(number: int) -> Iterator[None]:
    """Run a block as a process that dies instead of its rename number `number`; it need not get that far."""
    replace, done = os.replace, 0

    def ending(source: str, target: str) -> None:
        nonlocal done
        if done == number:
            raise _Killed
        done += 1
        replace(source, target)

    with mock.patch.object(os, "replace", ending), suppress(_Killed):
        yield
