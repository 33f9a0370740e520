"""What a table is going to do: which stores, which trainings, and which rows cannot be run and why."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.errors import MMDiffError
from mmdiff_cache.experiments.stores import (
    Absence,
    Need,
    extraction,
    fewest,
    needs_of,
    plan_store,
    published_bytes,
    samples_of,
)
from mmdiff_cache.experiments.table import Row, Table, Training
from mmdiff_cache.experiments.world import World
from mmdiff_cache.extraction.cost import operations_a_sample, show_duration, show_operations
from mmdiff_cache.extraction.plan import ExtractionPlan, show_bytes, with_time
from mmdiff_cache.extraction.resolve import resolve

GPU_OPERATIONS = 400e12
"""Operations a second, assumed of one H100-class GPU in bfloat16, for a backbone that is not here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStore:
    """A store to make, or to find finished."""

    need: Need
    extraction: ExtractionPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class MissingStore:
    """A store that cannot be made here, and what it would take."""

    need: Need
    reason: str
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
    trainings: Path
    """Folder of all trainings of this world, which its tables share."""
    stores: tuple[PlannedStore, ...]
    missing: tuple[MissingStore, ...]
    not_run: Mapping[tuple[str, str], str]
    """Reasons, by row and task."""

    @property
    def rows(self) -> tuple[tuple[Row, Training], ...]:
        """The trainings that can be run, each with its row."""
        return tuple(
            (row, training)
            for row in self.table.rows
            for training in wanted(row, self.tasks)
            if (row.name, training.tasks[0]) not in self.not_run
        )

    def timed(self) -> "TablePlan":
        """The same with the time of every extraction, where two blocks must be timed for it."""
        stores = (replace(one, extraction=with_time(one.extraction)) for one in self.stores)
        return replace(self, stores=tuple(stores))

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def wanted(row: Row, tasks: tuple[str, ...]) -> tuple[Training, ...]:
    """The trainings of a row that answer one of these tasks."""
    return tuple(training for training in row.trainings if set(training.tasks) & set(tasks))


def plan_table(
    table: Table, world: World, out: Path, name: str, tasks: tuple[str, ...] = (), *, download: bool = False
) -> TablePlan:
    """Find out what is here, and what has to be extracted and trained.

    `out` is the folder of all tables of a world, `name` that of this one in it; `tasks` are those to run, all
    by default. `download` fetches weights from the hub that are not here yet, as `extract` does. Raises
    ConfigError for a choice that cannot be.
    """
    out = out.expanduser().absolute()
    chosen = tuple(task for task in table.tasks if not tasks or task in tasks)
    absence = Absence(world, download=download)
    reasons: dict[tuple[str, str], str] = {}
    available: list[Need] = []
    lacking: list[tuple[Need, str]] = []
    for row in table.rows:
        for training in wanted(row, chosen):
            try:
                needs = needs_of(training, world)
                found = [(need, reason) for need in needs if (reason := absence.of(need)) is not None]
            except MMDiffError as error:
                reasons |= _for_all(row, training, str(error).splitlines()[0])
                continue
            if found:
                reasons |= _for_all(row, training, found[0][1])
                lacking += [(need, why) for need, why in found if absence.without_encoders(need)]
            else:
                available += needs
    stores, refused = _plan_stores(fewest(available), world)
    for row in table.rows:
        for training in wanted(row, chosen):
            if (row.name, training.tasks[0]) not in reasons:
                held = [
                    why for need in needs_of(training, world) for whole, why in refused if whole.holds(need)
                ]
                reasons |= _for_all(row, training, held[0]) if held else {}
    return TablePlan(
        table=table,
        world=world,
        tasks=chosen,
        out=out / name,
        trainings=out / "trainings",
        stores=stores,
        missing=tuple(_missing(need, lacking, world) for need in fewest(need for need, _ in lacking)),
        not_run=reasons,
    )


def _for_all(row: Row, training: Training, reason: str) -> dict[tuple[str, str], str]:
    return {(row.name, task): reason for task in training.tasks}


def _plan_stores(
    needs: tuple[Need, ...], world: World
) -> tuple[tuple[PlannedStore, ...], list[tuple[Need, str]]]:
    """A place for each store; what cannot be planned, with the reason."""
    stores: list[PlannedStore] = []
    refused: list[tuple[Need, str]] = []
    for need in needs:
        try:
            planned = plan_store(need, world, {one.extraction.store for one in stores})
        except MMDiffError as error:
            refused.append((need, str(error).splitlines()[0]))
        else:
            stores.append(PlannedStore(need=need, extraction=planned))
    return tuple(stores), refused


def _missing(need: Need, lacking: list[tuple[Need, str]], world: World) -> MissingStore:
    config, info = resolve(extraction(need, world)), describe(need.backbone)
    return MissingStore(
        need=need,
        reason=next(reason for part, reason in lacking if need.holds(part)),
        raw_bytes=published_bytes(need, world),
        operations=operations_a_sample(config, info) * samples_of(config),
    )


def _lines(plan: TablePlan) -> list[str]:
    steps = [training.config.steps for _, training in plan.rows]
    counted = (
        "" if None in steps else f", {sum(map(int, filter(None, steps))) * len(plan.world.seeds):,} steps"
    )
    runs = len(plan.rows) * len(plan.world.seeds)
    lines = [
        f"{'table':<10} {plan.table.title}",
        f"{'world':<10} {_world_words(plan.world, plan.tasks)}",
        f"{'rows':<10} {len(plan.table.rows)}, seeds {' '.join(map(str, plan.world.seeds))}",
    ]
    lines += [f"{'store':<10} {_store_words(one.extraction)}" for one in plan.stores]
    lines += [f"{'missing':<10} {_missing_words(one)}" for one in plan.missing]
    lines.append(f"{'trainings':<10} {runs}{counted}, in {plan.trainings}")
    lines += [f"{'not run':<10} {row}, {task}: {why}" for (row, task), why in plan.not_run.items()]
    return [*lines, f"{'results':<10} {plan.out}"]


def _world_words(world: World, tasks: tuple[str, ...]) -> str:
    data = ", ".join(f"{task} on {world.datasets[task]}" for task in tasks)
    return f"{world.name}: {data}; {world.flux}"


def _store_words(plan: ExtractionPlan) -> str:
    maps = f"{len(plan.schema.layers)} layers x {len(plan.schema.timesteps)} t"
    left = plan.total - plan.done
    if not left:
        return f"{plan.store}: {maps}, {plan.total:,} samples, finished"
    size = show_bytes(plan.stored_bytes * left / plan.total)
    hours = _gpu_hours(plan.cost.operations)
    return (
        f"{plan.store}: {maps}, {left:,} of {plan.total:,} samples to extract, {size} "
        f"({show_bytes(plan.free_bytes)} free), {plan.cost}; {hours}"
    )


def _missing_words(one: MissingStore) -> str:
    need = one.need
    maps = f"{len(need.layers)} layers x {len(need.timesteps)} t"
    return (
        f"{need.dataset} with {need.backbone}: {maps}, would take {show_bytes(one.raw_bytes)} raw "
        f"and {show_operations(one.operations)}, {_gpu_hours(one.operations)}"
    )


def _gpu_hours(operations: float) -> str:
    speed = show_operations(GPU_OPERATIONS)
    return f"{show_duration(operations / GPU_OPERATIONS)} of one GPU at {speed}/s"
