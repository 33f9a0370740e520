"""What a sweep is going to do: its runs, where each lies, and which share a reading."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.extraction.plan import show_bytes
from mmdiff_cache.loader import CachedFeatureDataset
from mmdiff_cache.sweeps import memory
from mmdiff_cache.sweeps.differences import differing, digest, slug
from mmdiff_cache.sweeps.memory import Need
from mmdiff_cache.sweeps.part import reason
from mmdiff_cache.sweeps.results import is_scored
from mmdiff_cache.sweeps.shared import lean, union
from mmdiff_cache.training.build import Setup
from mmdiff_cache.training.checkpoint import LAST
from mmdiff_cache.training.evaluate import SPLITS
from mmdiff_cache.training.folder import RUNS
from mmdiff_cache.training.loop import Reading, Stream
from mmdiff_cache.training.resolve import resolve
from mmdiff_cache.training.run import load_run

MAY_DIFFER = frozenset(
    (
        "task", "label", "run", "layers", "timesteps", "concepts", "discriminative", "aggregator", "decoder",
        "decoder_width", "steps", "learning_rate", "decoder_rate", "weight_decay", "ema", "holdout", "limit",
        "seed", "order_seed", "precision", "memory", "concept_maps", "standardise", "drop_channels", "clip",
        "accumulate", "checks", "patience", "compile", "subset_seed", "loss_weights", "balance_steps",
        "mixing",
    )
)  # fmt: skip
"""Fields in which runs that share a reading may differ, if their samples and the order are the same."""
NEW, GOING_ON, FINISHED, SCORED = "new", "going on", "finished", "scored"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """One training of a sweep."""

    asked: TrainConfig
    """As the recipe gave it."""
    config: TrainConfig
    """Resolved, with its folder."""
    setup: Setup
    need: Need
    state: str
    step: int
    """Steps done."""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return Path(filled(self.config.run))

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.folder.name

    @property
    def steps_left(self) -> int:
        """Steps still to be made."""
        return 0 if self.state in (FINISHED, SCORED) else filled(self.config.steps) - self.step

    @property
    def test_split(self) -> str | None:
        """The split that it is scored on; None where a store has none for it."""
        stores = [part.store for part in self.setup.parts]
        return next((s for s in SPLITS if all(s in store.splits for store in stores)), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPlan:
    """Runs, and the readings that they share."""

    folder: Path
    runs: tuple[PlannedRun, ...]
    parts: tuple[tuple[PlannedRun, ...], ...]
    """Runs that read together, for what is still to do."""
    refused: dict[str, str]
    """Configurations that cannot be trained, each with the reason."""
    evaluate: bool
    budget: int | None
    """Bytes that a part may take; None where nobody knows what is free."""
    groups: int
    """Readings that there would be with memory for all."""
    repeated: int = 0
    """Configurations that were given more than once, and count once."""
    bytes_a_map: dict[str, float] = field(default_factory=dict[str, float])
    """Bytes on disk of one (timestep, layer) map of a sample, by store."""

    def divided(self, workers: int) -> tuple[tuple[PlannedRun, ...], ...]:
        """The parts, cut further until each worker has one; every cut is a reading more.

        Every second run goes to either side: neighbours are alike, so both sides take about as long.
        """
        parts = [list(part) for part in self.parts]
        while len(parts) < workers and (largest := max(parts, key=len, default=[])) and len(largest) > 1:
            at = parts.index(largest)
            parts[at : at + 1] = [largest[::2], largest[1::2]]
        return tuple(tuple(part) for part in parts)

    def epoch_bytes(self, part: Sequence[PlannedRun]) -> float:
        """Bytes of hidden states that one reading takes from disk in an epoch of each part."""
        setup = part[0].setup
        if setup.config.source != "hidden_states":
            return 0.0
        total = 0.0
        for number, one in enumerate(setup.parts):
            whole = union([run.setup.parts[number].samples for run in part])
            maps = len(whole.maps) * len(whole.layers)
            total += len(one.samples) * maps * self.bytes_a_map[str(one.store.path)]
        return total

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def plan_sweep(
    configs: Sequence[TrainConfig], folder: Path, *, memory_bytes: int | None = None, evaluate: bool = True
) -> SweepPlan:
    """Resolve all configurations, find what is done already, and cut the rest into parts that fit memory.

    Raises ConfigError where there is no configuration at all. One that cannot be trained is listed.
    """
    if not configs:
        raise ConfigError("a sweep needs at least one configuration; sweep() returned none")
    folder = folder.expanduser().absolute()
    names = differing([config for config in configs])
    runs: dict[str, PlannedRun] = {}
    refused: dict[str, str] = {}
    repeated = 0
    for number, config in enumerate(configs, 1):
        try:
            run = _planned(config, folder, names, evaluate)
        except Exception as error:  # whatever it is, it is this configuration's alone
            refused[f"{number}. {slug(config, names)}"] = reason(error)
            continue
        repeated += run.name in runs
        runs.setdefault(run.name, run)
    todo = [run for run in runs.values() if run.state != (SCORED if evaluate else FINISHED)]
    groups = _groups(todo)
    budget = memory.budget_of(todo[0].config.device, memory_bytes) if todo else None
    return SweepPlan(
        folder=folder,
        runs=tuple(runs.values()),
        parts=tuple(part for group in groups for part in _parts(group, budget)),
        refused=refused,
        evaluate=evaluate,
        budget=budget,
        groups=len(groups),
        repeated=repeated,
        bytes_a_map={
            str(part.store.path): _bytes_a_map(part.samples)
            for run in runs.values()
            for part in run.setup.parts
        },
    )


def default_folder(recipe: Path) -> Path:
    """runs/sweep-<name of the recipe>."""
    return RUNS / f"sweep-{recipe.stem}"


def _planned(config: TrainConfig, sweep: Path, names: Sequence[str], evaluate: bool) -> PlannedRun:
    resolved = resolve(config)
    code = digest(resolved)
    known = sorted(sweep.glob(f"*-{code}"))  # its name may be of a list in which other things differed
    folder = known[0] if known else sweep / f"{slug(config, names)}-{code}"
    resolved = TrainConfig.from_json({**resolved.to_json(), "run": str(folder)})
    setup = lean(resolved)
    state, step = _state(folder, evaluate)
    return PlannedRun(
        asked=config, config=resolved, setup=setup, need=memory.need_of(setup), state=state, step=step
    )


def _state(folder: Path, evaluate: bool) -> tuple[str, int]:
    """How far a run has come: one whose checkpoint cannot be read is a CheckpointError."""
    if not (folder / LAST).exists():
        return NEW, 0
    run = load_run(folder)
    if not run.finished:
        return GOING_ON, run.step
    return (SCORED if evaluate and is_scored(run) else FINISHED), run.step


def reading_key(setup: Setup) -> tuple[Any, ...]:
    """What two runs must have in common to share a reading: their samples, the order, and how they are read.

    A field that is not known to be a training's own affair must be equal.
    """
    values = {f.name: getattr(setup.config, f.name) for f in fields(TrainConfig) if f.name not in MAY_DIFFER}
    reading = Reading.of(setup)
    streams = tuple(_stream_key(stream) for stream in reading.streams)
    as_text = json.dumps(values, default=repr, sort_keys=True)
    return streams, reading.ratio, reading.batch_size, reading.seed, as_text


def _stream_key(stream: Stream) -> tuple[Any, ...]:
    samples, inputs = stream.samples, stream.samples.inputs
    encoder = inputs.discriminative if inputs.source == "discriminative" else ()  # it is what is read
    held_out = () if stream.held_out is None else stream.held_out.indices
    return str(samples.store.path), samples.indices, held_out, encoder


def _groups(runs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    groups: dict[tuple[Any, ...], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault(reading_key(run.setup), []).append(run)
    return list(groups.values())


def _parts(group: Sequence[PlannedRun], budget: int | None) -> list[tuple[PlannedRun, ...]]:
    """A group cut so that each part fits the memory; what is read for all is counted for each part."""
    on_gpu = group[0].config.device.startswith("cuda")  # where the trainings are; samples are kept elsewhere
    reading = (memory.batch_bytes if on_gpu else memory.reading_bytes)([run.setup for run in group])
    parts = memory.cut([run.need for run in group], reading, budget)
    return [tuple(group[number] for number in part) for part in parts]


def _bytes_a_map(samples: CachedFeatureDataset) -> float:
    """The mean over the finished samples of the split."""
    reader = samples.reader
    folder = f"{reader.path.name}/hidden_states/"
    size = sum(entry.size for entry in reader.files if folder in entry.path)
    maps = len(reader.timesteps) * len(reader.layers) * len(reader.variants)
    return size / max(1, maps * len(reader.finished))


def _lines(plan: SweepPlan) -> list[str]:
    """The printed form, one fact a line."""
    states = [run.state for run in plan.runs]
    done = sum(state in (FINISHED, SCORED) for state in states)
    counts = (
        f"{len(states)} runs: {done} finished, {states.count(GOING_ON)} to go on, {states.count(NEW)} new"
    )
    repeated = f" ({plan.repeated} given twice)" if plan.repeated else ""
    shared = sum(plan.epoch_bytes(part) for part in plan.parts)
    alone = sum(plan.epoch_bytes([run]) for part in plan.parts for run in part)
    limit = "no limit known" if plan.budget is None else f"at most {show_bytes(plan.budget)} a reading"
    lines = [
        f"{'sweep':<10} {plan.folder}",
        f"{'runs':<10} {counts}{repeated}",
        f"{'readings':<10} {len(plan.parts)} ({plan.groups} with memory for all)",
        *(f"{'':<10} {_part_words(part)}" for part in plan.parts),
        f"{'memory':<10} {limit}",
        f"{'an epoch':<10} reads {show_bytes(shared)} of hidden states, run by run {show_bytes(alone)}",
        f"{'steps':<10} {sum(run.steps_left for run in plan.runs):,} to make",
    ]
    if not plan.evaluate:
        lines.append(f"{'test':<10} not scored")
    return lines + [f"{'refused':<10} {line}" for line in by_reason(plan.refused)]


def by_reason(failed: Mapping[str, str]) -> list[str]:
    """What failed, a line a reason."""
    names: dict[str, list[str]] = {}
    for name, why in failed.items():
        names.setdefault(why, []).append(name)
    return [
        f"{first}{f' and {len(others)} more' if others else ''}: {why}"
        for why, (first, *others) in names.items()
    ]


def _part_words(part: Sequence[PlannedRun]) -> str:
    tasks = ", ".join(dict.fromkeys(run.config.task for run in part))
    size = show_bytes(memory.total(run.need for run in part))
    stores = " and ".join(dict.fromkeys(str(one.store.path) for one in part[0].setup.parts))
    return f"{len(part)} runs ({tasks}) from {stores}, {size} of models"
