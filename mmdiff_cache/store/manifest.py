"""The manifest: what a store holds, under which identity, of which samples, made by what.

Four parts, compared differently. Identity must be equal. Contents and data asked for must be contained in
what is stored. Provenance that differs is worth a warning only. Besides, it keeps the resolved configuration
and the SHA-256 of every file that was written with it, which makes the metadata of all arrays part of what
can be checked.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mmdiff_cache.config import Fit
from mmdiff_cache.errors import ConfigError, DamageError, StoreError

from .records import Partition, canonical, is_text, partitions, seal, unseal
from .schema import FORMAT_VERSION, Discriminative, StoreSchema, Vocabulary, check_name

MANIFEST = "manifest.json"
NEXT_MANIFEST = "manifest.next.json"
"""There only while a store grows (growth)."""
Part = Literal["identity", "contents", "layout", "data", "provenance"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything a store says about itself, without time, process or host: equal plans give equal bytes."""

    identity: Mapping[str, Any]
    """What decides the stored values, as JSON: backbone weights hash, dtype, resolution and fit, `noise`
    ({form, seed, shared}, as NoiseConfig.to_json gives it), prompt rule, guidance, text length. Must be
    equal."""
    schema: StoreSchema
    splits: Mapping[str, tuple[str, ...]]
    """Ordered sample ids of every split."""
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Library versions, device, batch size ... A difference warns."""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The resolved configuration, as JSON, with which the store can be finished or made again."""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    """SHA-256 (hex) of every file written with the manifest, by path; filled when the store is created."""

    def __post_init__(self) -> None:
        if (
            not isinstance(self.identity.get("noise"), Mapping)
            or type(self.identity["noise"].get("seed")) is not int
        ):
            raise ConfigError("identity of a store must hold noise.seed, a whole number")
        if self.identity.get("fit", "squash") not in get_args(Fit):
            raise ConfigError(f"fit must be one of {', '.join(get_args(Fit))}, got {self.identity['fit']!r}")
        if not self.splits:
            raise ConfigError("a store must have at least one split")
        for split, ids in self.splits.items():
            check_name(split, "split")
            if not ids:
                raise ConfigError(f"split {split!r} of a store has no samples")
            for sample_id in ids:
                if not sample_id or "\0" in sample_id or not is_text(sample_id):
                    raise ConfigError(
                        f"a sample id must be non-empty UTF-8 text without NUL, got {sample_id!r}"
                    )
            if len(set(ids)) != len(ids):
                twice = next(i for n, i in enumerate(ids) if i in ids[:n])
                raise ConfigError(f"sample ids must be unique in a split; {split!r} has {twice!r} twice")

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the identity. Records carry it."""
        return hashlib.sha256(canonical(self.identity)).hexdigest()

    @property
    def seed(self) -> int:
        """Seed of the run's noise."""
        return self.identity["noise"]["seed"]

    @property
    def fit(self) -> Fit:
        """How pictures became the square network input."""
        return self.identity.get("fit", "squash")

    def partitions(self, split: str) -> tuple[Partition, ...]:
        """The partitions of a split, in order."""
        return partitions(split, len(self.splits[split]), self.schema.partition_size)


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json."""
    data = [
        {"split": split, "samples": len(ids), "sha256_of_ids": hash_of_ids(ids), "ids": list(ids)}
        for split, ids in manifest.splits.items()
    ]
    return seal(
        {
            "identity": manifest.identity,
            "fingerprint": manifest.fingerprint,
            "contents": manifest.schema.to_json(),
            "data": data,
            "provenance": manifest.provenance,
            "config": manifest.config,
            "metadata": manifest.metadata,
        }
    )


def hash_of_ids(ids: Sequence[str]) -> str:
    """SHA-256 (hex) of the ordered ids as canonical JSON."""
    return hashlib.sha256(canonical(list(ids))).hexdigest()


def read_manifest(root: Path, name: str = MANIFEST) -> Manifest:
    """The manifest of a store, or a copy of it under another name.

    Raises StoreError when the folder is no store or of another format version.
    """
    path = root / name
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{root} is not a store: it has no {name}; 'mmdiff-cache inspect' lists the stores there are"
        ) from None
    _check_version(data, path)
    body = unseal(data, str(path))
    try:
        return Manifest(
            identity=body["identity"],
            schema=StoreSchema.from_json(body["contents"]),
            splits={entry["split"]: tuple(entry["ids"]) for entry in body["data"]},
            provenance=body["provenance"],
            config=body["config"],
            metadata=body["metadata"],
        )
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{path} is not the manifest of a store: {error}") from error


def _check_version(data: bytes, path: Path) -> None:
    """Say so when another version of the format wrote the file, before its seal is judged by our rules."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return  # unseal names the damage
    version = body.get("format_version") if isinstance(body, dict) else None
    if version is None:
        raise StoreError(f"{path} has no format_version: the folder was not written by mmdiff-cache")
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version!r}, this mmdiff-cache reads version {FORMAT_VERSION}; "
            "use the release that wrote it, or extract into another folder with --store"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One field in which what is asked does not fit what is stored."""

    part: Part
    field: str
    stored: Any
    asked: Any

    def __str__(self) -> str:
        return f"{self.field} is {_short(self.stored)} in the store, {_short(self.asked)} was asked"


def _short(value: Any, limit: int = 120) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def compare(stored: Manifest, asked: Manifest) -> list[Difference]:
    """What of `asked` does not fit into `stored`, most serious first; empty when all of it is there.

    Layout (partition size, codec) matters only while something is left to be written.
    """
    return [
        *_unequal("identity", stored.identity, asked.identity),
        *_contents(stored.schema, asked.schema),
        *_data(stored.splits, asked.splits),
        *_layout(stored.schema, asked.schema),
        *_unequal("provenance", stored.provenance, asked.provenance),
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested JSON as pairs of dotted name and plain value."""
    for key in values:
        value = values[key]
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _unequal(part: Part, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[Difference]:
    have, want = dict(flatten(stored)), dict(flatten(asked))
    for name in sorted(have.keys() | want.keys()):
        if name not in have or name not in want or have[name] != want[name]:
            yield Difference(part=part, field=name, stored=have.get(name), asked=want.get(name))


def _contents(stored: StoreSchema, asked: StoreSchema) -> Iterator[Difference]:
    for name in ("layers", "variants", "cross_attention"):
        have, want = getattr(stored, name), getattr(asked, name)
        if not set(want) <= set(have):
            yield Difference(part="contents", field=name, stored=have, asked=want)
    if not all(any(math.isclose(t, s, abs_tol=1e-9) for s in stored.timesteps) for t in asked.timesteps):
        yield Difference(part="contents", field="timesteps", stored=stored.timesteps, asked=asked.timesteps)
    for name in ("grid", "channels", "latent_channels", "image_size"):
        if getattr(stored, name) != getattr(asked, name):
            yield Difference(
                part="contents", field=name, stored=getattr(stored, name), asked=getattr(asked, name)
            )
    vocabularies = {vocabulary.name: vocabulary for vocabulary in stored.vocabularies}
    for want in asked.vocabularies:
        yield from _vocabulary(vocabularies.get(want.name), want)
    encoders = {encoder.name: encoder for encoder in stored.discriminative}
    for encoder in asked.discriminative:
        yield from _encoder(encoders.get(encoder.name), encoder)
    labels = {label.spec.name: label for label in stored.labels}
    for label in asked.labels:
        have = labels.get(label.spec.name)
        fits = (
            have is not None
            and have.spec == label.spec
            and all(a <= b for a, b in zip(label.canvas, have.canvas, strict=True))
        )
        if not fits:
            yield Difference(part="contents", field=f"labels.{label.spec.name}", stored=have, asked=label)


def _vocabulary(have: Vocabulary | None, want: Vocabulary) -> Iterator[Difference]:
    """Concepts must be the same list: a vocabulary cannot be cut, its concepts attend to each other."""
    name = f"concepts.{want.name}"
    if have is None:
        yield Difference(part="contents", field=name, stored="absent", asked=want.concepts)
        return
    if have.concepts != want.concepts:
        yield Difference(part="contents", field=name, stored=have.concepts, asked=want.concepts)
    if not set(want.blocks) <= set(have.blocks):
        yield Difference(part="contents", field=f"{name}.blocks", stored=have.blocks, asked=want.blocks)
    averaged = [vocabulary.map_blocks or vocabulary.blocks for vocabulary in (have, want)]
    if averaged[0] != averaged[1]:
        yield Difference(part="contents", field=f"{name}.map_blocks", stored=averaged[0], asked=averaged[1])


def _encoder(have: Discriminative | None, want: Discriminative) -> Iterator[Difference]:
    name = f"discriminative.{want.name}"
    if have is None:
        yield Difference(part="contents", field=name, stored="absent", asked=", ".join(want.layers))
        return
    for part in dataclasses.fields(want):
        before, now = getattr(have, part.name), getattr(want, part.name)
        if before != now:
            yield Difference(part="contents", field=f"{name}.{part.name}", stored=before, asked=now)


def _data(
    stored: Mapping[str, tuple[str, ...]], asked: Mapping[str, tuple[str, ...]]
) -> Iterator[Difference]:
    for split, want in asked.items():
        have = stored.get(split)
        if have is None:
            yield Difference(part="data", field="splits", stored=sorted(stored), asked=sorted(asked))
        elif have[: len(want)] != want:
            first = next((n for n, (a, b) in enumerate(zip(have, want, strict=False)) if a != b), len(have))
            if first == len(have):
                yield Difference(part="data", field=f"samples of {split}", stored=len(have), asked=len(want))
            else:
                field_name = f"sample {first} of {split}"
                yield Difference(part="data", field=field_name, stored=have[first], asked=want[first])


def _layout(stored: StoreSchema, asked: StoreSchema) -> Iterator[Difference]:
    for name in ("partition_size", "codec"):
        if getattr(stored, name) != getattr(asked, name):
            yield Difference(
                part="layout", field=name, stored=getattr(stored, name), asked=getattr(asked, name)
            )


def with_metadata(manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """The manifest with the hashes of the files that are written with it."""
    hashes = {path: hashlib.sha256(data).hexdigest() for path, data in sorted(files.items())}
    return dataclasses.replace(manifest, metadata=hashes)


def free_name(root: Path) -> Path:
    """A folder beside `root` that does not exist yet: root-2, root-3 ..."""
    number = 2
    while (root.parent / f"{root.name}-{number}").exists():
        number += 1
    return root.parent / f"{root.name}-{number}"
