"""The commands that look after stores. Each parses, calls the library, prints, and ends with the line to type
next.
"""

from pathlib import Path
from typing import Annotated, get_args

import typer

from mmdiff_cache.cli.configuration import parse_list, parse_numbers
from mmdiff_cache.cli.console import next_command, next_training, print_json, progress_bar, say
from mmdiff_cache.cli.everyday import SOME_FAILED, AsJson, DryRun, Layers, Limit, Timesteps
from mmdiff_cache.config import Codec
from mmdiff_cache.errors import ConfigError

DAMAGED = 1
StoreFolder = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store.")]


def verify(
    store: StoreFolder,
    limit: Limit = None,
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


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a store.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder of the store to write.")],
    split: Annotated[list[str] | None, typer.Option(help="A split to keep; may be repeated.")] = None,
    layers: Layers = None,
    timesteps: Timesteps = None,
    variants: Annotated[
        str | None, typer.Option(metavar="N,N", help="Variants to keep, by position from 0.")
    ] = None,
    discriminative: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Encoders to keep, or 'none'.")
    ] = None,
    limit: Limit = None,
    codec: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(get_args(Codec))}; int8 is lossy, about 0.5 %.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Make another store from one that is there, without the backbone: less of it, or encoded otherwise."""
    from mmdiff_cache.store import convert as conversion

    chosen = next((name for name in get_args(Codec) if name == codec), None)
    if codec is not None and chosen is None:
        raise ConfigError(f"codec must be one of {', '.join(get_args(Codec))}, got {codec!r}")
    selection = conversion.Selection(
        splits=split,
        layers=parse_list(layers),
        timesteps=parse_numbers("--timesteps", timesteps),
        variants=[int(number) for number in parse_numbers("--variants", variants) or ()] or None,
        discriminative=[] if discriminative == "none" else parse_list(discriminative),
        limit=limit,
        codec=chosen,
    )
    plan = conversion.plan_conversion(source, target, selection)
    say(str(plan))
    if dry_run:
        return
    with progress_bar("convert") as advance:
        store = conversion.convert(plan, advance)
    say(f"\n{store}")
    next_command("mmdiff-cache", "inspect", str(target))


labels = typer.Typer(help="Label sets of a store: add one beside those that are there.")


def add(
    store: StoreFolder,
    name: Annotated[str, typer.Option(help="What the label set is to be called.")],
    folder: Annotated[
        Path, typer.Option("--from", help="Label files DIR/<id>.png or .npy, or DIR/<split>/<id>...")
    ],
    kind: Annotated[str, typer.Option(help="classes, mask or depth.")] = "classes",
    classes: Annotated[str | None, typer.Option(metavar="A,B", help="Names of ids 0, 1 ...")] = None,
    ignore: Annotated[int | None, typer.Option(help="The id that counts for nothing.")] = None,
    valid_range: Annotated[
        str | None, typer.Option(metavar="LOW,HIGH", help="Metres that count; needed for depth.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Metres a unit of a depth file: 0.001 for mm.")] = 1.0,
) -> None:
    """Add a label set from a folder of files named by sample id. Features and other labels stay untouched."""
    from mmdiff_cache.datasets.label_folder import LabelFolder, label_spec
    from mmdiff_cache.extraction.labels import add_labels

    spec = label_spec(name, kind, parse_list(classes), ignore, parse_numbers("--valid-range", valid_range))
    with progress_bar("labels") as advance:
        added = add_labels(store, LabelFolder(root=folder, spec=spec, scale=scale), advance)
    say(str(added))
    next_training(name, spec.kind, store)
    if added.unusable:
        raise typer.Exit(SOME_FAILED)
