"""The commands of experiments: many trainings at once, and runs side by side."""

from pathlib import Path
from typing import Annotated

import typer

from mmdiff_cache.cli.configuration import read_sweep
from mmdiff_cache.cli.console import next_command, print_json, progress_bar, say, warn

SOME_FAILED = 3


def sweep(
    config: Annotated[Path, typer.Option("--config", help="A recipe (.py) with sweep().")],
    out_: Annotated[
        Path | None, typer.Option("--out", help="Folder to write, or to go on with; runs/sweep-NAME.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Processes, one a GPU; 0: this one. All visible GPUs by default."
        ),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS|FILE", help="A running dask cluster to join.")
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(metavar="BYTES", min=1, help="Trainings side by side may fill; 60 % of what is free."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A field of every configuration."),
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Score the test split (or val) in one pass.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Train many configurations that read the store together. Safe to stop and run again."""
    from mmdiff_cache.cli.tables import show_by_task
    from mmdiff_cache.sweeps import run
    from mmdiff_cache.sweeps.plan import by_reason, default_folder, plan_sweep

    configs = read_sweep(config, set_ or [])
    plan = plan_sweep(configs, out_ or default_folder(config), memory_bytes=memory, evaluate=evaluate)
    say(str(plan))
    if dry_run:
        return
    with progress_bar("sweep") as advance:
        result = run.sweep(plan, workers=workers, scheduler=scheduler, progress=advance)
    show_by_task(result.table)
    if result.table.rows:
        say(f"\ntable  {result.path / run.CSV}\nplot   {result.path / run.PLOT}")
        next_command("mmdiff-cache", "compare", str(result.path))
    for line in by_reason(result.failed):
        warn(line)
    if result.failed:
        raise typer.Exit(SOME_FAILED)


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders that 'train' or 'sweep' wrote.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Put runs side by side: what differs in their configurations, scores, parameters, steps, seconds."""
    from mmdiff_cache.cli.tables import show_by_task
    from mmdiff_cache.sweeps import compare as side_by_side

    found = side_by_side(runs)
    if as_json:
        return print_json(found.to_json())
    return show_by_task(found)
