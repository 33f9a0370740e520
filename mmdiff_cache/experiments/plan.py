"""What a table is going to do: which stores, which trainings, and which rows cannot be run and why."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.errors import ConfigError, MMDiffError
from mmdiff_cache.experiments.needs import Need, fewest, needs_of, store_for
from mmdiff_cache.experiments.stores import (
    Absence,
    extraction,
    finished_store,
    in_one_line,
    plan_store,
    published_bytes,
    samples_of,
)
from mmdiff_cache.experiments.table import Row, Table, Training, group_reasons
from mmdiff_cache.experiments.world import World
from mmdiff_cache.extraction.cost import operations_a_sample, show_duration, show_operations
from mmdiff_cache.extraction.plan import ExtractionPlan, show_bytes, with_time
from mmdiff_cache.extraction.plan import plan as plan_extraction
from mmdiff_cache.extraction.resolve import resolve

GPU_OPERATIONS = 400e12
"""Operations a second, assumed of one H100-class GPU in bfloat16."""
NAME_LENGTH = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTraining:
    """A training of a row, with what it reads."""

    row: Row
    training: Training
    needs: tuple[Need, ...]
    """One for each of its tasks; none where that cannot be said."""
    reason: str | None
    """Why it cannot be run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStore:
    """A store to make, or that is there."""

    need: Need
    path: Path
    extraction: ExtractionPlan | None
    """None for a finished one whose data set or weights are not here: nothing more can be added to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MissingStore:
    """A store that cannot be made here, and what it would take."""

    need: Need
    raw_bytes: int
    """Of hidden states, by the data set's published size."""
    operations: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TablePlan:
    """A table in a world, with what it takes. `str(plan)` is what the command prints."""

    table: Table
    world: World
    tasks: tuple[str, ...]
    out: Path
    """Folder of the table's own files."""
    folder: Path
    """Folder of all trainings of this world, which its tables share."""
    trainings: tuple[PlannedTraining, ...]
    """Row by row."""
    stores: tuple[PlannedStore, ...]
    missing: tuple[MissingStore, ...]
    whole: bool
    """Not only some of its rows or tasks."""

    @property
    def runnable(self) -> tuple[PlannedTraining, ...]:
        """Those that nothing is missing for."""
        return tuple(one for one in self.trainings if one.reason is None)

    @property
    def not_run(self) -> list[str]:
        """What cannot be run and why, a line a reason."""
        return group_reasons(
            {
                (one.row.name, task): one.reason
                for one in self.trainings
                if one.reason
                for task in one.training.tasks
            }
        )

    def now(self) -> "TablePlan":
        """The same, where stores may have grown since: tables of one command share them."""
        stores = (
            one if one.extraction is None else replace(one, extraction=plan_extraction(one.extraction.config))
            for one in self.stores
        )
        return replace(self, stores=tuple(stores))

    def timed(self) -> "TablePlan":
        """The same with the time of every extraction, where two blocks must be timed for it."""
        stores = (
            one if one.extraction is None else replace(one, extraction=with_time(one.extraction))
            for one in self.stores
        )
        return replace(self, stores=tuple(stores))

    def __str__(self) -> str:
        return "\n".join(f"{name:<10} {text}" for name, text in _lines(self))


def plan_tables(
    tables: Mapping[str, Table],
    world: World,
    out: Path,
    *,
    rows: Sequence[str] = (),
    tasks: Sequence[str] = (),
    download: bool = False,
) -> list[TablePlan]:
    """Find out what is here, and what has to be extracted and trained, for tables by their names.

    `out` is the folder of all tables of a world; each has one of its own in it. Their stores are planned
    together, so that what two of them read is extracted once. `rows` (parts of their names) and `tasks` are
    those to run, all by default; such a part of a table has a folder of its own, and shares the trainings.
    `download` fetches weights from the hub that are not here yet, as `extract` does. Raises ConfigError for a
    row or task that a table does not have.
    """
    out, absence = out.expanduser().absolute(), Absence(world, download=download)
    parts = {name: _part(table, rows, tasks) for name, table in tables.items()}
    kept: dict[Need, Path] = {}
    looked = {name: _look_at_all(part, tasks, world, absence, kept) for name, part in parts.items()}
    needs = [need for found in looked.values() for need in _to_make(found, kept)]
    stores, refused = _plan_stores(fewest(needs), world)
    return [
        TablePlan(
            table=part,
            world=world,
            tasks=_chosen(part, tasks),
            out=out / _part_name(name, [*rows, *tasks]),
            folder=out / "trainings",
            trainings=tuple(refuse(one, refused) for one in looked[name]),
            stores=_read_by(looked[name], kept, stores),
            missing=_missing_stores(looked[name], world, absence, kept),
            whole=not (rows or tasks),
        )
        for name, part in parts.items()
    ]


def plan_table(
    table: Table, world: World, out: Path, name: str, *, rows: Sequence[str] = (), tasks: Sequence[str] = ()
) -> TablePlan:
    """The same for one table, without downloads."""
    return plan_tables({name: table}, world, out, rows=rows, tasks=tasks)[0]


def _part(table: Table, rows: Sequence[str], tasks: Sequence[str]) -> Table:
    """The rows that are asked for."""
    for task in tasks:
        if task not in table.tasks:
            raise ConfigError(f"task {task!r} is not in this table; it has {', '.join(table.tasks)}")
    return table.only(rows) if rows else table


def _chosen(table: Table, tasks: Sequence[str]) -> tuple[str, ...]:
    return tuple(task for task in table.tasks if not tasks or task in tasks)


def _look_at_all(
    table: Table, tasks: Sequence[str], world: World, absence: Absence, kept: dict[Need, Path]
) -> list[PlannedTraining]:
    """All trainings of a table that answer a task that is asked for."""
    chosen = set(_chosen(table, tasks))
    return [
        _look(row, training, world, absence, kept)
        for row in table.rows
        for training in row.trainings
        if set(training.tasks) & chosen
    ]


def _to_make(trainings: Sequence[PlannedTraining], kept: Mapping[Need, Path]) -> list[Need]:
    """What stores have to hold that are here or can be made."""
    return [need for one in trainings if one.reason is None for need in one.needs if need not in kept]


def _read_by(
    trainings: Sequence[PlannedTraining], kept: Mapping[Need, Path], stores: Sequence[PlannedStore]
) -> tuple[PlannedStore, ...]:
    """Of all stores those that these trainings read."""
    everything = {one.need: one for one in stores}
    everything |= {need: PlannedStore(need=need, path=path, extraction=None) for need, path in kept.items()}
    paths = {need: one.path for need, one in everything.items()}
    read = {store_for(need, paths) for one in trainings if one.reason is None for need in one.needs}
    return tuple(one for one in everything.values() if one.path in read)


def _missing_stores(
    trainings: Sequence[PlannedTraining], world: World, absence: Absence, kept: Mapping[Need, Path]
) -> tuple[MissingStore, ...]:
    lacking = [
        need for one in trainings for need in one.needs if need not in kept and absence.without_encoders(need)
    ]
    return tuple(_missing(need, world) for need in fewest(lacking))


def refuse(planned: PlannedTraining, refused: Mapping[Need, str]) -> PlannedTraining:
    """A training that one of its stores cannot be made for, with the reason; any other as it is."""
    reasons = (why for need in planned.needs for whole, why in refused.items() if whole.holds(need))
    return planned if planned.reason else replace(planned, reason=next(reasons, None))


def _look(
    row: Row, training: Training, world: World, absence: Absence, kept: dict[Need, Path]
) -> PlannedTraining:
    """What a training needs, and what it lacks; `kept` gets the stores that make up for that."""
    needs: tuple[Need, ...] = ()
    try:
        needs = needs_of(training, world)
        lacking = {need: why for need in needs if (why := absence.of(need)) is not None}
        found = {need: path for need in lacking if (path := finished_store(need, world)) is not None}
        kept |= found
        reason = next((why for need, why in lacking.items() if need not in found), None)
    except MMDiffError as error:
        reason = in_one_line(error)
    return PlannedTraining(row=row, training=training, needs=needs, reason=reason)


def _part_name(name: str, chosen: Sequence[str]) -> str:
    """The folder of a table, or of a part of it."""
    words = "-".join([name, *(re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") for text in chosen)])
    if len(words) <= NAME_LENGTH:
        return words
    code = hashlib.sha256("\n".join(chosen).encode()).hexdigest()[
        :8
    ]  # what is cut off may be all that differs
    return f"{words[: NAME_LENGTH - len(code) - 1]}-{code}"


def _plan_stores(needs: tuple[Need, ...], world: World) -> tuple[tuple[PlannedStore, ...], dict[Need, str]]:
    """A place for each store; what cannot be planned, with the reason."""
    stores: list[PlannedStore] = []
    refused: dict[Need, str] = {}
    for need in needs:
        try:
            planned = plan_store(need, world, {one.path for one in stores})
        except MMDiffError as error:
            refused[need] = in_one_line(error)
        else:
            stores.append(PlannedStore(need=need, path=planned.store, extraction=planned))
    return tuple(stores), refused


def _missing(need: Need, world: World) -> MissingStore:
    config, info = resolve(extraction(need, world)), describe(need.backbone)
    return MissingStore(
        need=need,
        raw_bytes=published_bytes(need, world),
        operations=operations_a_sample(config, info) * samples_of(config),
    )


def _lines(plan: TablePlan) -> list[tuple[str, str]]:
    world, runs = plan.world, len(plan.runnable) * len(plan.world.seeds)
    data = dict.fromkeys(
        f"{task} on {dataset}"
        for one in plan.trainings
        for task, dataset in zip(one.training.tasks, one.training.datasets, strict=True)
        if task in plan.tasks
    )
    backbones = dict.fromkeys(one.training.backbone for one in plan.trainings)
    return [
        ("table", plan.table.title),
        ("world", f"{world.name}: {', '.join(data)}; {', '.join(backbones)}"),
        ("rows", f"{len(plan.table.rows)}, seeds {' '.join(map(str, world.seeds))}"),
        *(("store", line) for line in dict.fromkeys(map(_store_words, plan.stores))),
        *(("missing", _missing_words(one)) for one in plan.missing),
        ("trainings", f"{runs}{_steps(plan)}, in {plan.folder}"),
        *(("not run", line) for line in plan.not_run),
        ("results", str(plan.out)),
    ]


def _steps(plan: TablePlan) -> str:
    steps = [one.training.config.steps for one in plan.runnable]
    known = [count for count in steps if count is not None]
    return f", {sum(known) * len(plan.world.seeds):,} steps" if len(known) == len(steps) else ""


def _store_words(store: PlannedStore) -> str:
    plan = store.extraction
    if plan is None:
        return f"{store.path}: finished, used as it is (what it was made from is not all here)"
    maps = f"{len(plan.schema.layers)} layers x {len(plan.schema.timesteps)} t"
    left = plan.total - plan.done
    if not left:
        return f"{plan.store}: {maps}, {plan.total:,} samples, finished"
    size = show_bytes(plan.stored_bytes * left / plan.total)
    return (
        f"{plan.store}: {maps}, {left:,} of {plan.total:,} samples to extract, {size} "
        f"({show_bytes(plan.free_bytes)} free), {plan.cost}; {_gpu_hours(plan.cost.operations)}"
    )


def _missing_words(one: MissingStore) -> str:
    need = one.need
    return (
        f"{need.dataset} with {need.backbone}: {len(need.layers)} layers x {len(need.timesteps)} t, would "
        f"take {show_bytes(one.raw_bytes)} before the codec, {_gpu_hours(one.operations)}"
    )


def _gpu_hours(operations: float) -> str:
    return f"{show_duration(operations / GPU_OPERATIONS)} of one GPU at {show_operations(GPU_OPERATIONS)}/s"
