"""The command of the paper's tables: recipes carried out from the data to the figures."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdiff_cache.cli.configuration import parse_assignments, parse_named, parse_seeds, read_table
from mmdiff_cache.cli.console import next_command, out, progress_bar, safe, say, warn
from mmdiff_cache.errors import ConfigError

if TYPE_CHECKING:
    from mmdiff_cache.experiments.plan import TablePlan
    from mmdiff_cache.experiments.result import TableResult

SOME_FAILED = 3


def table(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="Recipes (.py) with table(world).")
    ],
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TASK=]NAME", help="scenes, or a data set for one task; the paper's by default."
        ),
    ] = None,
    backbone: Annotated[
        list[str] | None,
        typer.Option(help="A FLUX or SD3.5 in the place of the default one: a name, a folder, or org/name."),
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="A DINOv3; dinov3-vitb16 by default.")] = None,
    data_root: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Folder of a data set's files.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=RULE", help="Prompts of a data set, such as voc=captions.jsonl."),
    ] = None,
    row: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Only rows with this in their name.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,N", help="0,1,2 by default.")] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N samples of every split.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps and samples: does it run?")] = False,
    out_: Annotated[
        Path | None, typer.Option("--out", help="Folder of this world's tables; runs/tables-WORLD.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A field of every training.")
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(metavar="BYTES", min=1, help="Trainings side by side may fill; 60 % of what is free."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Processes: one a GPU by default, or so many on the CPU."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Carry out tables of the paper: extract, train, score, compare. Safe to stop and run again."""
    from mmdiff_cache.experiments.plan import plan_tables
    from mmdiff_cache.experiments.world import make_world
    from mmdiff_cache.training.folder import RUNS

    world = make_world(
        datasets=dataset or (),
        backbones=backbone or (),
        encoder=encoder,
        roots=parse_named("--data-root", data_root),
        prompts=parse_named("--prompts", prompts),
        seeds=parse_seeds(seeds),
        limit=limit,
        quick=quick,
        settings=parse_assignments(set_ or []),
    )
    tables = {recipe.stem.replace("_", "-"): read_table(recipe, world) for recipe in recipes}
    if len(tables) < len(recipes):
        raise ConfigError(f"recipes need names of their own, got {', '.join(map(str, recipes))}")
    plans = plan_tables(
        tables,
        world,
        out_ or RUNS / f"tables-{world.name}",
        rows=row or (),
        tasks=task or (),
        download=not dry_run,
    )
    if dry_run:
        return say("\n\n".join(str(plan.timed()) for plan in plans))
    options: Mapping[str, Sequence[object]] = {
        "--dataset": dataset or (),
        "--backbone": backbone or (),
        "--encoder": [encoder] if encoder else (),
        "--data-root": data_root or (),
        "--prompts": prompts or (),
        "--seeds": [seeds] if seeds else (),
        "--limit": [limit] if limit else (),
        "--set": set_ or (),
        "--out": [out_] if out_ else (),
    }
    words = [word for name, values in options.items() for one in values for word in (name, str(one))]
    words += ["--quick"] if quick else []
    lines = [shlex.join(["mmdiff-cache", "table", str(recipe), *words]) for recipe in recipes]
    return _carry_out(dict(zip(lines, plans, strict=True)), memory, workers)


def _carry_out(plans: "Mapping[str, TablePlan]", memory: int | None, workers: int | None) -> None:
    """The tables one after another, by their commands, and the page of all claims of their world."""
    from mmdiff_cache.experiments.page import write_page
    from mmdiff_cache.experiments.run import run_table

    broken = False
    for command, planned in plans.items():
        plan = planned.now()
        say(f"\n{plan}")
        result = run_table(plan, say=say, bar=progress_bar, memory=memory, workers=workers, command=command)
        _show(result)
        broken |= result.broken
    trainings = next(iter(plans.values())).folder
    say(f"claims {write_page(trainings.parent)}")
    next_command("mmdiff-cache", "compare", str(trainings))
    if broken:
        raise typer.Exit(SOME_FAILED)


def _show(result: "TableResult") -> None:
    """The table of every task, the claims, and what was not run."""
    from mmdiff_cache.experiments import report

    for task in result.tasks:
        _print(task, report.header(result, task), report.cells(result, task))
    if result.judgements:
        _print("claims", report.claim_header(), report.claim_cells(result))
    for note in result.table.notes:
        say(f"note: {note}")
    say(f"\ntable  {result.path / report.MARKDOWN}")
    if (result.path / report.PLOT).exists():
        say(f"plot   {result.path / report.PLOT}")
    for line in result.failed:
        warn(f"not run: {line}")


def _print(title: str, header: list[str], lines: list[list[str]]) -> None:
    from mmdiff_cache.cli.tables import new_table

    shown = new_table(*map(safe, header))
    for line in lines:
        shown.add_row(*map(safe, line))
    out.print(f"\n[bold]{safe(title)}[/]")
    out.print(shown)
