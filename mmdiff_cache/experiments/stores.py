"""Where the stores of a table lie: what is there already, what has to be extracted, what cannot be had."""

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

from mmdiff_cache.backbones import weights
from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.config import ExtractConfig, data_folder, filled
from mmdiff_cache.datasets.concepts import PRESETS
from mmdiff_cache.datasets.registry import DatasetEntry, find_dataset
from mmdiff_cache.encoders import weights as encoder_weights
from mmdiff_cache.encoders.registry import describe_encoder
from mmdiff_cache.errors import MMDiffError, StoreError
from mmdiff_cache.experiments.needs import Need
from mmdiff_cache.experiments.world import World
from mmdiff_cache.extraction.plan import ExtractionPlan, plan
from mmdiff_cache.extraction.resolve import recorded, resolve
from mmdiff_cache.store.manifest import MANIFEST, Manifest, compare, read_manifest
from mmdiff_cache.store.records import record_path
from mmdiff_cache.training.evaluate import SPLITS as SCORED

IDENTITY = (
    "dataset", "backbone", "prompts", "dtype", "quantisation", "resolution", "fit", "noise", "guidance",
    "text_length", "generation",
)  # fmt: skip
"""Fields of the configuration that decide what is stored; `extract` compares the weights themselves."""
QUANTISED = "int8"
"""A codec that changes values; no table reads it."""


def in_one_line(error: MMDiffError) -> str:
    """An error in one line, without the lines to type that some announce."""
    return str(error).splitlines()[0].removesuffix(" One of these helps:").rstrip(".")


class Absence:
    """Why something cannot be had here, in the words of `extract`; each asked for once."""

    def __init__(self, world: World, *, download: bool) -> None:
        self._world, self._download = world, download
        self._known: dict[tuple[str, str], str | None] = {}

    def of(self, need: Need) -> str | None:
        """The first thing that a need lacks: data set, backbone or encoder; None where all is there."""
        things = [("dataset", need.dataset), ("backbone", need.backbone)]
        things += [("encoder", name) for name in sorted(need.encoders)]
        return next((reason for reason in map(self._of, things) if reason is not None), None)

    def without_encoders(self, need: Need) -> str | None:
        """The same, whatever encoders there are."""
        return self.of(replace(need, encoders=frozenset()))

    def _of(self, thing: tuple[str, str]) -> str | None:
        if thing not in self._known:
            self._known[thing] = self._look(*thing)
        return self._known[thing]

    def _look(self, kind: str, name: str) -> str | None:
        try:
            if kind == "dataset":
                resolution = describe(self._world.backbone).resolution
                dataset = find_dataset(name).open(self._world.roots.get(name), resolution)
                for split in find_dataset(name).splits_in(self._world.roots.get(name)):
                    dataset.sample_ids(split)
            elif kind == "backbone":
                weights.locate(describe(name), download=self._download)
            else:
                encoder_weights.locate(describe_encoder(name), download=self._download)
        except MMDiffError as error:
            return in_one_line(error)
        return None


def plan_store(need: Need, world: World, taken: Collection[Path]) -> ExtractionPlan:
    """The extraction that a need asks for, in the first fitting place that is not `taken`.

    That is data/<data set>/<backbone>, or where something else lies there, the same with -2, -3 ... A new
    store also gets what costs little and other tables ask for: the data set's vocabularies and averaged
    cross-attention. Raises as `extraction.plan.plan` does.
    """
    least = extraction(need, world)
    for folder in _places(need):
        if folder not in taken:
            there = (folder / MANIFEST).exists()
            found = _fitting(least, folder) if there else plan(_generous(least, folder))
            if found is not None:
                return found
    raise AssertionError("places never end")


def extraction(need: Need, world: World) -> ExtractConfig:
    """What `extract` is told, without a place."""
    info = describe(need.backbone)
    return ExtractConfig(
        dataset=need.dataset,
        data_root=world.roots.get(need.dataset),
        splits=_splits(find_dataset(need.dataset)),
        limit=world.limit,
        prompts=world.prompts.get(need.dataset, "empty"),
        backbone=need.backbone,
        layers=tuple(layer for layer in info.blocks if layer in need.layers),
        timesteps=tuple(sorted(need.timesteps, reverse=True)),
        concepts={name: PRESETS[name] for name in PRESETS if name in need.vocabularies},
        discriminative=tuple(sorted(need.encoders)),
        cross_attention=need.cross_attention,
        draws=need.draws,
    )


def _splits(dataset: DatasetEntry) -> tuple[str, ...] | None:
    """What is trained on and what is scored: scenes also have splits that no table reads. None for all,
    where only the files say which there are.
    """
    there = (*dataset.splits, *dataset.more_splits)
    scored = next((split for split in SCORED if split in there), None)
    read = tuple(split for split in there if split in ("train", scored))
    return None if dataset.find_splits is not None else read


def _generous(config: ExtractConfig, folder: Path) -> ExtractConfig:
    words = {**find_dataset(config.dataset).concepts, **filled(config.concepts)}
    return replace(config, concepts=words, cross_attention=True, store=str(folder))


def _places(need: Need) -> Iterator[Path]:
    folder = data_folder().absolute() / need.dataset / describe(need.backbone).name
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in count(2))


def _fitting(least: ExtractConfig, folder: Path) -> ExtractionPlan | None:
    """The plan for a store that is there, if it holds what is asked, of exactly the samples asked for.

    One that is not finished is finished as it was begun.
    """
    try:
        stored, planned = read_manifest(folder), plan(replace(least, store=str(folder)))
    except StoreError:
        return None
    more = {split: stored.splits.get(split) for split in planned.samples}
    if not _same_identity(stored, planned.config) or more != planned.samples:
        return None
    hashes = {encoder.name: encoder.weights_sha256 for encoder in stored.schema.discriminative}
    encoders = tuple(  # a plan reads no weights; `extract` compares them
        replace(encoder, weights_sha256=hashes.get(encoder.name, ""))
        for encoder in planned.schema.discriminative
    )
    schema = replace(planned.schema, discriminative=encoders)
    differences = compare(stored, replace(stored, schema=schema))
    if any(difference.part == "contents" for difference in differences):
        return None
    if planned.done == planned.total:
        return planned
    return plan(replace(recorded(stored, folder), data_root=planned.config.data_root))


def finished_store(need: Need, world: World) -> Path | None:
    """A finished store that holds a need, found without data set and weights: it may come from elsewhere."""
    for folder in _places(need):
        if not (folder / MANIFEST).exists():
            return None
        try:
            stored, asked = read_manifest(folder), resolve(extraction(need, world))
        except MMDiffError:
            continue
        same = _same_identity(stored, asked) and stored.config.get("limit") == world.limit
        if same and _holds(stored, need) and _finished(folder, stored):
            return folder
    return None


def _same_identity(stored: Manifest, asked: ExtractConfig) -> bool:
    """Whether the recorded choices agree, as far as they decide what is stored."""
    wanted = asked.to_json()
    lossless = QUANTISED not in (stored.config.get("codec"), asked.codec)
    return lossless and all(stored.config.get(name) == wanted[name] for name in IDENTITY)


def _holds(stored: Manifest, need: Need) -> bool:
    schema = stored.schema
    words = {vocabulary.name: vocabulary.concepts for vocabulary in schema.vocabularies}
    encoders = {encoder.name for encoder in schema.discriminative}
    return (
        need.layers <= set(schema.layers)
        and need.timesteps <= set(schema.timesteps)
        and need.draws <= sum(not variant.flipped for variant in schema.variants)
        and all(words.get(name) == PRESETS[name] for name in need.vocabularies)
        and {describe_encoder(name).name for name in need.encoders} <= encoders
        and (bool(schema.cross_attention) or not need.cross_attention)
    )


def _finished(folder: Path, stored: Manifest) -> bool:
    return all(
        (folder / record_path(partition)).exists()
        for split in stored.splits
        for partition in stored.partitions(split)
    )


def published_bytes(need: Need, world: World) -> int:
    """Bytes of hidden states that a need takes by the data set's published size, before the codec."""
    config, info = extraction(need, world), describe(need.backbone)
    rows, columns = info.token_grid(find_dataset(need.dataset).resolution or info.resolution)
    a_map = rows * columns * info.channels * 2
    return samples_of(config) * need.maps * a_map


def samples_of(config: ExtractConfig) -> int:
    """Samples by the data set's published size, at most `limit` of a split."""
    most = math.inf if config.limit is None else config.limit
    dataset = find_dataset(config.dataset)
    sizes = {**dataset.splits, **dataset.more_splits}
    return int(sum(min(sizes[split] or 0, most) for split in config.splits or sizes))
