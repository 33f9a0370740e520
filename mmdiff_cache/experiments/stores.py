"""The stores that trainings need: what each has to hold, how few bytes do it, and what is there already."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from mmdiff_cache.backbones import weights
from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.config import ExtractConfig, data_folder, filled
from mmdiff_cache.datasets.concepts import PRESETS
from mmdiff_cache.datasets.registry import find_dataset
from mmdiff_cache.encoders import weights as encoder_weights
from mmdiff_cache.encoders.registry import describe_encoder
from mmdiff_cache.errors import ConfigError, MMDiffError, StoreError
from mmdiff_cache.experiments.table import Training
from mmdiff_cache.experiments.world import CLEAREST, World
from mmdiff_cache.extraction.plan import ExtractionPlan, plan
from mmdiff_cache.loader.inputs import CROSS_ATTENTION, NO_CONCEPTS
from mmdiff_cache.store.manifest import MANIFEST, compare, read_manifest
from mmdiff_cache.tasks import find_task
from mmdiff_cache.training.unified import VOCABULARY

IDENTITY = (
    "dataset", "backbone", "prompts", "dtype", "quantisation", "resolution", "fit", "noise", "guidance",
    "text_length", "generation",
)  # fmt: skip
"""Fields of the configuration that decide what is stored; `extract` compares the weights themselves."""
QUANTISED = "int8"
"""A codec that changes values; no table reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What trainings read of one data set's store of one backbone."""

    dataset: str
    backbone: str
    layers: frozenset[str]
    timesteps: frozenset[float]
    draws: int
    vocabularies: frozenset[str]
    encoders: frozenset[str]
    """Names or folders, as `extract` takes them."""
    cross_attention: bool

    @property
    def maps(self) -> int:
        """Maps of hidden states a sample."""
        return len(self.layers) * len(self.timesteps) * self.draws

    def joined(self, other: "Need") -> "Need":
        """What holds both."""
        return replace(
            self,
            layers=self.layers | other.layers,
            timesteps=self.timesteps | other.timesteps,
            draws=max(self.draws, other.draws),
            vocabularies=self.vocabularies | other.vocabularies,
            encoders=self.encoders | other.encoders,
            cross_attention=self.cross_attention or other.cross_attention,
        )

    def holds(self, other: "Need") -> bool:
        """Whether all of another is in it."""
        same = (self.dataset, self.backbone) == (other.dataset, other.backbone)
        return same and self.joined(other) == self


def needs_of(training: Training, world: World) -> tuple[Need, ...]:
    """What a training reads, one need for each of its tasks, in their order.

    Raises ConfigError for a vocabulary that has no preset, or a backbone that is not known.
    """
    config, info = training.config, describe(training.backbone)
    of_backbone = config.source == "hidden_states"
    several = len(training.tasks) > 1
    needs: list[Need] = []
    for task, dataset in zip(training.tasks, training.datasets, strict=True):
        words = config.concepts or (VOCABULARY if several else find_task(task).vocabulary)
        if words not in (NO_CONCEPTS, CROSS_ATTENTION, *PRESETS):
            raise ConfigError(f"concepts {words!r} are not known; there are {', '.join(PRESETS)}")
        # other sources are stored with any features: the least of them
        layers = config.layers or info.layers if of_backbone else info.layers[-1:]
        timesteps = config.timesteps or info.timesteps if of_backbone else CLEAREST
        info.check_layers(layers)
        needs.append(
            Need(
                dataset=dataset,
                backbone=training.backbone,
                layers=frozenset(layers),
                timesteps=frozenset(timesteps),
                draws=1 + max(config.variants or (0,)),
                vocabularies=frozenset((words,)) - {NO_CONCEPTS, CROSS_ATTENTION},
                encoders=frozenset(
                    world.encoder if e == world.encoder_name else e for e in config.discriminative
                ),
                cross_attention=words == CROSS_ATTENTION,
            )
        )
    return tuple(needs)


def fewest(needs: Iterable[Need]) -> tuple[Need, ...]:
    """Stores that hold all needs, joined where that takes no more maps than apart.

    A store has all of its layers at all of its timesteps: four double-stream blocks at one t, put beside four
    single-stream blocks at four, would be stored at all four.
    """
    found: list[Need] = []
    for need in sorted(dict.fromkeys(needs), key=lambda need: -need.maps):
        for number, other in enumerate(found):
            whole = other.joined(need)
            same = (other.dataset, other.backbone) == (need.dataset, need.backbone)
            if same and whole.maps <= other.maps + need.maps:
                found[number] = whole
                break
        else:
            found.append(need)
    return tuple(found)


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
    asked = planned.config.to_json()
    if any(stored.config.get(name) != asked[name] for name in IDENTITY):
        return None
    if QUANTISED in (stored.config.get("codec"), asked["codec"]) or dict(stored.splits) != planned.samples:
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
    begun = {**stored.config, "store": str(folder), "data_root": asked["data_root"]}
    return plan(ExtractConfig.from_json(begun))


def store_for(need: Need, stores: Mapping[Need, Path]) -> Path | None:
    """The store that holds a need, the smallest of several; None where there is none."""
    holding = [whole for whole in stores if whole.holds(need)]
    return stores[min(holding, key=lambda whole: whole.maps)] if holding else None


def published_bytes(need: Need, world: World) -> int:
    """Bytes of hidden states that a need takes by the data set's published size, before the codec."""
    config, info = extraction(need, world), describe(need.backbone)
    rows, columns = info.token_grid(find_dataset(need.dataset).resolution or info.resolution)
    a_map = rows * columns * info.channels * 2
    return samples_of(config) * need.maps * a_map


def samples_of(config: ExtractConfig) -> int:
    """Samples by the data set's published size, at most `limit` of a split."""
    most = math.inf if config.limit is None else config.limit
    return int(sum(min(size or 0, most) for size in find_dataset(config.dataset).splits.values()))
