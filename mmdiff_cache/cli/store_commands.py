"""The commands that look after stores. Each parses, calls the library, prints, and ends with the line to type
next.
"""

from pathlib import Path
from typing import Annotated

import typer

from mmdiff_cache.cli.console import next_command, print_json, progress_bar, say
from mmdiff_cache.cli.everyday import AsJson

DAMAGED = 1
StoreFolder = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store.")]


def verify(
    store: StoreFolder,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N samples of every split.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte and every value of a store against its records. Exit code 1: something is damaged."""
    from mmdiff_cache.store.verify import verify as check

    with progress_bar("verify") as advance:
        found = check(store, limit, progress=advance)
    if as_json:
        print_json(found.to_json())
    else:
        say(str(found))
    if not found.sound and not as_json:
        next_command("mmdiff-cache", "repair", str(store))
    if not found.sound:
        raise typer.Exit(DAMAGED)
    if not as_json:
        next_command("mmdiff-cache", "inspect", str(store))


def repair(store: StoreFolder) -> None:
    """Verify a store, and extract again just what is damaged or missing, with its recorded configuration."""
    from mmdiff_cache.extraction.repair import repair as mend

    with progress_bar("repair") as advance:
        found = mend(store, progress=advance)
    say(str(found))
    if not found.sound:
        raise typer.Exit(DAMAGED)
    next_command("mmdiff-cache", "inspect", str(store))
