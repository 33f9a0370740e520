"""What a run of stage one will do and cost, known before any weight is read."""

import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmdiff_cache.backbones.info import NATIVE, BackboneInfo, default_attention
from mmdiff_cache.backbones.registry import BACKBONES, describe
from mmdiff_cache.config import ExtractConfig, data_folder, filled
from mmdiff_cache.datasets.base import Dataset
from mmdiff_cache.datasets.prompts import ORACLE, PromptRule, open_prompts
from mmdiff_cache.datasets.registry import DatasetEntry, find_dataset
from mmdiff_cache.errors import ConfigError, DataError, StorageRefused
from mmdiff_cache.extraction.cost import Cost, device_type, estimate
from mmdiff_cache.extraction.memory import choose_text_pass
from mmdiff_cache.store.manifest import MANIFEST, read_manifest
from mmdiff_cache.store.records import record_path
from mmdiff_cache.store.schema import (
    LabelArray,
    StoreSchema,
    Vocabulary,
    estimated_bytes,
    file_count,
    raw_bytes,
)

TOKENS_A_BATCH = 4096
LARGEST_BATCH = 8
"""Default batch: as many samples as give 4096 tokens a timestep, at most 8 (4 at 512 px, 1 at 1024 px)."""
PARTITION = 64
"""Default samples a partition, rounded up to whole batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionPlan:
    """A resolved configuration with all that follows from it. `str(plan)` is what the command prints."""

    config: ExtractConfig
    backbone: BackboneInfo
    dataset: Dataset
    prompts: PromptRule
    samples: Mapping[str, tuple[str, ...]]
    """Ordered sample ids of every split: those that the store has, in its order, then new ones."""
    positions: Mapping[str, tuple[int, ...]]
    """Where each of them is in the data set."""
    unexpected: Mapping[str, tuple[int, int]]
    """Splits whose number of samples is not the published one: how many there are, and should be."""
    schema: StoreSchema
    done: int
    """Samples of the plan that are in the store already, as far as its records say."""
    new: int
    """Samples that the store which is there was not planned with: they need `append`."""
    raw_bytes: int
    stored_bytes: int
    """Estimated bytes on disk, rounded to the safe side."""
    files: int
    scratch_bytes: int
    """Most that a first pass of the text encoders writes beside the store, until the run ends."""
    cost: Cost
    free_bytes: int
    """Free space on the disk that will hold the store."""

    @property
    def store(self) -> Path:
        """The folder of the store, absolute."""
        return Path(filled(self.config.store))

    @property
    def total(self) -> int:
        """Samples over all splits."""
        return sum(map(len, self.samples.values()))

    def __str__(self) -> str:
        return "\n".join(f"{name:<10} {text}" for name, text in _lines(self))


def resolve(config: ExtractConfig) -> ExtractConfig:
    """Fill every None with the default of the data set or the backbone; paths become absolute.

    Raises ConfigError for an unknown data set, split, layer, prompt rule or a resolution that does not fit.
    """
    config = ExtractConfig.from_json(config.to_json())  # lists and paths from Python become what is stored
    entry = find_dataset(config.dataset)
    name = config.backbone or entry.backbone
    info = describe(name)
    splits = config.splits or tuple(entry.splits)
    _check_splits(splits, entry)
    info.check_layers(config.layers or ())
    resolution = config.resolution or entry.resolution or info.resolution
    rows, columns = info.token_grid(resolution)
    batch_size, partition_size = _batching(config, rows * columns)
    quantisation = config.quantisation or "none"
    attention = config.attention or default_attention(info)
    info.check_attention(attention)
    if config.guidance is not None and info.guidance is None:
        raise ConfigError(f"{info.name} takes no guidance scale; leave out --guidance {config.guidance:g}")
    return replace(
        config,
        data_root=_absolute(config.data_root),
        splits=splits,
        backbone=name if name in BACKBONES else info.source,
        layers=config.layers or info.layers,
        timesteps=config.timesteps or info.timesteps,
        concepts=entry.concepts if config.concepts is None else config.concepts,
        resolution=resolution,
        guidance=info.guidance if config.guidance is None else config.guidance,
        text_length=config.text_length or info.text_length,
        dtype=config.dtype or info.dtype,
        quantisation=quantisation,
        attention=attention,
        compile=_compiles(config.device, quantisation) if config.compile is None else config.compile,
        text_pass=config.text_pass or choose_text_pass(info, config.device),
        batch_size=batch_size,
        partition_size=partition_size,
        store=_absolute(config.store or str(data_folder() / config.dataset / info.name)),
    )


def plan(config: ExtractConfig, samples: Mapping[str, Sequence[str]] | None = None) -> ExtractionPlan:
    """Work out a run: samples, arrays, bytes, files, time, free disk. Reads no weights, writes nothing.

    `samples` are the ids of every split, where it is known which are wanted (repair). Raises ConfigError
    for a choice that cannot be, DataError for a data set that cannot be used.
    """
    config = resolve(config)
    entry, info = find_dataset(config.dataset), describe(filled(config.backbone))
    dataset = entry.open(config.data_root, filled(config.resolution))
    prompts = open_prompts(config.prompts, entry.prompt_kinds)
    positions = _positions(config, dataset, samples)
    ids = {split: dataset.sample_ids(split) for split in positions}
    chosen = {split: tuple(ids[split][n] for n in where) for split, where in positions.items()}
    for names in chosen.values():
        prompts.check(names)
    schema = _schema(config, info, dataset)
    counts = [len(names) for names in chosen.values()]
    done = _count_done(Path(filled(config.store)), chosen)
    return ExtractionPlan(
        config=config,
        backbone=info,
        dataset=dataset,
        prompts=prompts,
        samples=chosen,
        positions=positions,
        unexpected={
            split: (len(ids[split]), expected)
            for split in positions
            if (expected := entry.splits.get(split)) is not None and len(ids[split]) != expected
        },
        schema=schema,
        done=done,
        new=_count_new(Path(filled(config.store)), chosen),
        raw_bytes=sum(raw_bytes(schema, count) for count in counts),
        stored_bytes=sum(estimated_bytes(schema, count, filled(config.dtype)) for count in counts),
        files=sum(file_count(schema, count) for count in counts),
        scratch_bytes=_scratch_bytes(config, info, prompts, chosen, left=sum(counts) - done),
        cost=estimate(config, info, samples=sum(counts) - done),
        free_bytes=shutil.disk_usage(existing_parent(Path(filled(config.store)))).free,
    )


def check_disk(plan: ExtractionPlan) -> None:
    """Raise StorageRefused when what is left to write does not fit on the disk."""
    needed = math.ceil(plan.stored_bytes * (plan.total - plan.done) / plan.total) + plan.scratch_bytes
    if needed > plan.free_bytes:
        raise StorageRefused(
            f"the store needs about {show_bytes(needed)} more, but the disk of {plan.store} has "
            f"{show_bytes(plan.free_bytes)} free; "
            "choose fewer --layers, --timesteps or samples (--limit), or another disk with --store"
        )


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path, or the path itself, that exists.

    Raises StorageRefused when it is a file.
    """
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise StorageRefused(f"{path} is a file, a store must lie in a folder; choose another --store")
    return path


def show_bytes(count: float) -> str:
    """Bytes in decimal units: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(os.path.expanduser(path))


def _scratch_bytes(
    config: ExtractConfig,
    info: BackboneInfo,
    prompts: PromptRule,
    samples: Mapping[str, tuple[str, ...]],
    *,
    left: int,
) -> int:
    """Zero where the text encoders stay; concepts, one vector each, are not worth counting."""
    if config.text_pass != "first":
        return 0
    different = prompts.most([sample_id for names in samples.values() for sample_id in names])
    return min(different, left) * info.prompt_bytes(filled(config.text_length), filled(config.dtype))


def _compiles(device: str, quantisation: str) -> bool:
    return quantisation == "none" and device_type(device) == "cuda"


def _check_splits(splits: Iterable[str], entry: DatasetEntry) -> None:
    for split in splits:
        if split not in entry.splits:
            raise ConfigError(f"split {split!r} is not one of {entry.name}: {', '.join(entry.splits)}")


def _batching(config: ExtractConfig, tokens: int) -> tuple[int, int]:
    """Batch and partition size; a default gives way to the one that was chosen."""
    batch = config.batch_size or max(1, min(LARGEST_BATCH, TOKENS_A_BATCH // tokens))
    partition = config.partition_size or math.ceil(PARTITION / batch) * batch
    if config.batch_size is None:
        batch = next(size for size in range(batch, 0, -1) if partition % size == 0)
    return batch, partition


def _positions(
    config: ExtractConfig, dataset: Dataset, samples: Mapping[str, Sequence[str]] | None
) -> dict[str, tuple[int, ...]]:
    """Which samples of the data set are wanted, and in which order, by split."""
    root = Path(filled(config.store))
    stored = read_manifest(root).splits if (root / MANIFEST).exists() else {}
    found: dict[str, tuple[int, ...]] = {}
    for split in filled(config.splits):
        place = {sample_id: n for n, sample_id in enumerate(dataset.sample_ids(split))}
        if samples is None:
            kept = stored.get(split, ())[: config.limit]
            same = any(sample_id in place for sample_id in kept)  # else it is another data set's store
            wanted = list(dict.fromkeys([*(kept if same else ()), *place]))[: config.limit]
        else:
            wanted = samples.get(split, ())
        gone = next((sample_id for sample_id in wanted if sample_id not in place), None)
        if gone is not None:
            raise DataError(
                f"sample {gone!r} of {root} is no longer in split {split} of the data set; bring it back, or "
                "choose another --store"
            )
        if wanted:
            found[split] = tuple(place[sample_id] for sample_id in wanted)
    return found


def _count_done(store: Path, samples: Mapping[str, tuple[str, ...]]) -> int:
    if not (store / MANIFEST).exists():
        return 0
    stored = read_manifest(store)
    recorded = (
        min(partition.stop, len(samples[split])) - partition.start
        for split in samples.keys() & stored.splits.keys()
        for partition in stored.partitions(split)
        if (store / record_path(partition)).exists()
    )
    return sum(max(count, 0) for count in recorded)


def _count_new(store: Path, samples: Mapping[str, tuple[str, ...]]) -> int:
    if not (store / MANIFEST).exists():
        return 0
    stored = read_manifest(store).splits
    return sum(len(ids) - len(set(ids) & set(stored.get(split, ()))) for split, ids in samples.items())


def _schema(config: ExtractConfig, info: BackboneInfo, dataset: Dataset) -> StoreSchema:
    resolution = filled(config.resolution)
    return StoreSchema(
        layers=filled(config.layers),
        timesteps=filled(config.timesteps),
        grid=info.token_grid(resolution),
        channels=info.channels,
        latent_channels=info.packed_channels,
        image_size=(resolution, resolution),
        vocabularies=tuple(
            Vocabulary(name=name, concepts=words, blocks=info.double_blocks, map_blocks=info.concept_blocks)
            for name, words in filled(config.concepts).items()
        ),
        labels=tuple(LabelArray(spec=spec, canvas=dataset.canvas) for spec in dataset.label_specs),
        partition_size=filled(config.partition_size),
        codec=config.codec,
    )


def _lines(plan: ExtractionPlan) -> Iterable[tuple[str, str]]:
    config, schema = plan.config, plan.schema
    first = f" (the first {config.limit} of each split at most)" if config.limit else ""
    yield "data set", f"{config.dataset}: {_counts(plan.samples)}{first}"
    for split, (there, expected) in plan.unexpected.items():
        yield "note", f"split {split} has {there:,} samples here, {expected:,} as published"
    yield (
        "prompts",
        f"{config.prompts}{' (names the objects: scores are an upper bound)' * (config.prompts == ORACLE)}",
    )
    yield "backbone", f"{plan.backbone.name}, {config.dtype} on {plan.cost.device}{_how(config)}"
    rows, columns = schema.grid
    yield "input", f"{config.resolution} px square = {rows} x {columns} tokens of {schema.channels} channels"
    yield "layers", " ".join(schema.layers)
    yield "timesteps", " ".join(f"{t:g}" for t in schema.timesteps)
    yield "concepts", ", ".join(f"{v.name} ({' '.join(v.concepts)})" for v in schema.vocabularies) or "none"
    yield "labels", ", ".join(label.spec.name for label in schema.labels) or "none"
    yield "batches", f"{config.batch_size} samples a forward pass, {config.partition_size} a partition"
    there = f" (holds {plan.done:,} of these {plan.total:,} samples already)" if plan.done else ""
    yield "store", f"{plan.store}{there}"
    if plan.new:
        yield "note", f"the store was planned without {plan.new:,} of them; --append adds those"
    ratio = plan.raw_bytes / plan.stored_bytes
    yield (
        "size",
        (
            f"{show_bytes(plan.raw_bytes)} raw, about {show_bytes(plan.stored_bytes)} on disk "
            f"({ratio:.2f} : 1 assumed) in {plan.files:,} files"
        ),
    )
    if config.text_pass == "first":
        yield (
            "text",
            f"encoders first and alone, at most {show_bytes(plan.scratch_bytes)} of scratch while it runs",
        )
    yield "time", str(plan.cost)
    yield "free disk", show_bytes(plan.free_bytes)


def _how(config: ExtractConfig) -> str:
    """What is not as usual in how the backbone computes."""
    weights = f", weights in {config.quantisation}" if config.quantisation != "none" else ""
    kernels = f", {config.attention} attention" if config.attention != NATIVE else ""
    return f"{weights}{kernels}{', compiled blocks' if config.compile else ''}"


def _counts(samples: Mapping[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{split} {len(ids):,}" for split, ids in samples.items())
