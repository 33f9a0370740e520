"""What a run of stage one will do and cost, known before any weight is read."""

import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmdiff_cache.backbones.info import NATIVE, BackboneInfo
from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.backbones.weights import locate, weight_files
from mmdiff_cache.config import ExtractConfig, filled
from mmdiff_cache.datasets.base import Dataset
from mmdiff_cache.datasets.prompt_list import PromptList
from mmdiff_cache.datasets.prompts import ORACLE, PromptRule, open_prompts
from mmdiff_cache.datasets.registry import find_dataset
from mmdiff_cache.encoders.registry import describe_encoder
from mmdiff_cache.errors import BackboneError, DataError, StorageRefused
from mmdiff_cache.extraction.cost import Cost, estimate, time_blocks
from mmdiff_cache.extraction.drawing import describe_generation
from mmdiff_cache.extraction.measured import Ratios, known_ratios
from mmdiff_cache.extraction.placement import worker_count
from mmdiff_cache.extraction.resolve import resolve
from mmdiff_cache.extraction.variants import variants_of
from mmdiff_cache.store.arrays import arrays
from mmdiff_cache.store.manifest import MANIFEST, read_manifest
from mmdiff_cache.store.records import record_path
from mmdiff_cache.store.schema import (
    Discriminative,
    LabelArray,
    StoreSchema,
    Vocabulary,
    estimated_bytes,
    file_count,
    raw_bytes,
)


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
    ratios: Ratios | None
    """What compression leaves, where an earlier run was measured."""
    stored_bytes: int
    """Estimated bytes on disk; as before the codec where `ratios` are not known."""
    files: int
    scratch_bytes: int
    """Most that a first pass of the text encoders writes beside the store, until the run ends."""
    cost: Cost
    free_bytes: int
    """Free space on the disk that will hold the store."""
    free_files: int | None
    """Files that this disk can still take; None where it has no such limit."""

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


def plan(config: ExtractConfig, samples: Mapping[str, Sequence[str]] | None = None) -> ExtractionPlan:
    """Work out a run: samples, arrays, bytes, files, time, free disk. Reads no weights, writes nothing.

    `samples` are the ids of every split, where it is known which are wanted (repair). Raises ConfigError
    for a choice that cannot be, DataError for a data set that cannot be used.
    """
    config = resolve(config)
    entry, info = find_dataset(config.dataset), describe(filled(config.backbone))
    dataset = entry.open(config.prompts if entry.drawn else config.data_root, filled(config.resolution))
    prompts = (
        dataset.rule if isinstance(dataset, PromptList) else open_prompts(config.prompts, entry.prompt_kinds)
    )
    positions = _positions(config, dataset, samples)
    ids = {split: dataset.sample_ids(split) for split in positions}
    chosen = {split: tuple(ids[split][n] for n in where) for split, where in positions.items()}
    for names in chosen.values():
        prompts.check(names)
    if prompts.kind in entry.prompt_kinds and (bare := dataset.sample_without_prompt(prompts.kind)):
        raise DataError(f"{bare} has no prompt, and --prompts {prompts.kind} needs one for every sample")
    schema = _schema(config, info, dataset)
    counts = [len(names) for names in chosen.values()]
    ratios = known_ratios(config)
    disk = existing_parent(Path(filled(config.store)))
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
        ratios=ratios,
        stored_bytes=sum(_estimated(schema, count, ratios) for count in counts),
        files=sum(file_count(schema, count) for count in counts),
        scratch_bytes=_scratch_bytes(config, info, prompts, chosen, left=sum(counts) - done),
        cost=estimate(config, info, samples=sum(counts) - done),
        free_bytes=shutil.disk_usage(disk).free,
        free_files=_free_files(disk),
    )


def on_workers(plan: ExtractionPlan, workers: int | None) -> ExtractionPlan:
    """The plan with the time that it takes on so many workers, counted as `placement.open_cluster` does.

    Raises ConfigError for more workers than GPUs.
    """
    gpus = max(1, worker_count(plan.config, workers))
    return plan if plan.cost.device == "cpu" else replace(plan, cost=replace(plan.cost, gpus=gpus))


def with_time(plan: ExtractionPlan) -> ExtractionPlan:
    """The plan with a time; where no speed is known, two blocks are timed with random weights.

    Raises ConfigError for a device that is not there.
    """
    if plan.cost.speed is not None or plan.done == plan.total:
        return plan
    return replace(plan, cost=time_blocks(plan.cost, plan.config, plan.backbone))


def check_disk(plan: ExtractionPlan) -> None:
    """Raise StorageRefused when what is left to write does not fit on the disk."""
    left = (plan.total - plan.done) / plan.total
    remedy = (
        "choose fewer --layers, --timesteps or samples (--limit), another disk with --store, or try it all "
        "the same with --force"
    )
    needed = math.ceil(plan.stored_bytes * left) + plan.scratch_bytes
    if needed > plan.free_bytes:
        raise StorageRefused(
            f"the store needs about {show_bytes(needed)} more, but the disk of {plan.store} has "
            f"{show_bytes(plan.free_bytes)} free; {remedy}"
        )
    if plan.free_files is not None and math.ceil(plan.files * left) > plan.free_files:
        raise StorageRefused(
            f"the store needs about {plan.files * left:,.0f} more files, but the disk of {plan.store} can "
            f"take {plan.free_files:,}; {remedy}"
        )


def _free_files(folder: Path) -> int | None:
    disk = os.statvfs(folder)
    return disk.f_favail if disk.f_files else None


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
        variants=variants_of(config.draws, flip=config.flip),
        vocabularies=tuple(
            Vocabulary(name=name, concepts=words, blocks=info.double_blocks, map_blocks=info.concept_blocks)
            for name, words in filled(config.concepts).items()
        ),
        cross_attention=info.double_blocks if config.cross_attention else (),
        discriminative=tuple(
            Discriminative(name=e.name, layers=e.layers, grid=e.grid(resolution), channels=e.channels)
            for e in map(describe_encoder, config.discriminative)
        ),
        labels=tuple(LabelArray(spec=spec, canvas=dataset.canvas) for spec in dataset.label_specs),
        partition_size=filled(config.partition_size),
        codec=config.codec,
        drawn=config.generation is not None,
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
    if config.generation is not None:
        yield "drawing", describe_generation(config.generation)
    yield "backbone", f"{plan.backbone.name}, {config.dtype} on {plan.cost.device}{_how(config)}"
    rows, columns = schema.grid
    tokens = f"{rows} x {columns} tokens of {schema.channels} channels"
    yield "input", f"{config.resolution} px square ({config.fit}) = {tokens}"
    yield "layers", " ".join(schema.layers)
    yield "timesteps", " ".join(f"{t:g}" for t in schema.timesteps)
    if len(schema.variants) > 1:
        mirrored = ", each also mirrored" if config.flip else ""
        yield "variants", f"{len(schema.variants)}: {config.draws} noise draw(s) of every sample{mirrored}"
    yield "concepts", ", ".join(f"{v.name} ({' '.join(v.concepts)})" for v in schema.vocabularies) or "none"
    for encoder, name in zip(schema.discriminative, config.discriminative, strict=True):
        yield "encoder", f"{encoder} ({describe_encoder(name).licence})"
    yield "labels", ", ".join(label.spec.name for label in schema.labels) or "none"
    yield "batches", f"{config.batch_size} samples a forward pass, {config.partition_size} a partition"
    there = f" (holds {plan.done:,} of these {plan.total:,} samples already)" if plan.done else ""
    yield "store", f"{plan.store}{there}"
    if plan.new:
        yield "note", f"the store was planned without {plan.new:,} of them; --append adds those"
    yield "size", f"{show_bytes(plan.raw_bytes)} raw in {plan.files:,} files{_compressed(plan)}"
    yield "arrays", ", ".join(f"{name} {show_bytes(size)}" for name, size in bytes_by_array(plan).items())
    if config.text_pass == "first":
        yield (
            "text",
            f"encoders first and alone, at most {show_bytes(plan.scratch_bytes)} of scratch while it runs",
        )
    yield "time", str(plan.cost)
    if plan.cost.device == "cuda":
        yield "GPU memory", _gpu_memory(plan)
    yield "break-even", _break_even(plan)
    files = "" if plan.free_files is None else f", room for {plan.free_files:,} files"
    yield "free disk", f"{show_bytes(plan.free_bytes)}{files}"


def bytes_by_array(plan: ExtractionPlan) -> dict[str, int]:
    """Raw bytes of every array or group of arrays at the top of a split, over all splits; largest first."""
    sizes: dict[str, int] = {}
    for ids in plan.samples.values():
        for spec in arrays(replace(plan.schema, codec="zstd"), len(ids)):
            name = spec.path.partition("/")[0]
            sizes[name] = sizes.get(name, 0) + spec.nbytes
    shown = {name: size for name, size in sizes.items() if size >= plan.raw_bytes / 1000}
    return dict(sorted(shown.items(), key=lambda entry: -entry[1]))


def _compressed(plan: ExtractionPlan) -> str:
    if plan.ratios is None:
        return "; compressed size unknown (no run was measured yet)"
    source = f"hidden states {plan.ratios.hidden_states:.2f} : 1 in {plan.ratios.source}"
    return f"; about {show_bytes(plan.stored_bytes)} compressed ({source})"


def _estimated(schema: StoreSchema, samples: int, ratios: Ratios | None) -> int:
    if ratios is None:
        return estimated_bytes(schema, samples)
    return estimated_bytes(schema, samples, ratios.hidden_states, ratios.others)


def _gpu_memory(plan: ExtractionPlan) -> str:
    try:
        folder = locate(plan.backbone)
    except BackboneError:
        return "unknown (the weights are not here)"
    weights = sum((folder / name).stat().st_size for name in weight_files(folder))
    batch = plan.cost.activation_bytes
    beside = (
        "unknown for a batch (--dry-run times it)" if batch is None else f"{show_bytes(batch)} for a batch"
    )
    return f"{show_bytes(weights)} of weights by their files, {beside}"


def _break_even(plan: ExtractionPlan) -> str:
    """The disk below which it is quicker to compute a sample again than to read it."""
    if plan.cost.seconds is None or plan.done == plan.total:
        return "unknown (it follows from the time)"
    seconds = plan.cost.seconds / (plan.total - plan.done)
    speed = show_bytes(plan.stored_bytes / plan.total / seconds)
    return f"a disk that reads less than {speed}/s is slower than this machine's transformer"


def _how(config: ExtractConfig) -> str:
    """What is not as usual in how the backbone computes."""
    weights = f", weights in {config.quantisation}" if config.quantisation != "none" else ""
    kernels = f", {config.attention} attention" if config.attention != NATIVE else ""
    return f"{weights}{kernels}{', compiled blocks' if config.compile else ''}"


def _counts(samples: Mapping[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{split} {len(ids):,}" for split, ids in samples.items())
