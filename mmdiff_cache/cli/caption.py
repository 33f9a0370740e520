"""`mmdiff-cache caption`: prompts for pictures that have none."""

from pathlib import Path
from typing import Annotated

import typer

from mmdiff_cache.cli.configuration import compose
from mmdiff_cache.cli.console import next_command, progress_bar, say, warn
from mmdiff_cache.cli.everyday import SOME_FAILED, Assignments, Limit


def caption(
    dataset: Annotated[str, typer.Option(help="Data set: voc, images ...")],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="File of captions to write or go on with.")],
    data_root: Annotated[str | None, typer.Option(help="Folder of the data set's files.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="A split; may be repeated.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder, or a repository; google/gemma-3-4b-it by default.")
    ] = None,
    limit: Limit = None,
    set_: Assignments = None,
) -> None:
    """Have a vision-language model describe every picture, for 'extract --prompts'. Safe to stop, and to run
    again.
    """
    from mmdiff_cache.captioning import run

    flags = {
        "dataset": dataset,
        "out": str(out),
        "data_root": data_root,
        "splits": split or None,
        "model": model,
        "limit": limit,
    }
    config = compose(run.CaptionConfig, "caption", None, flags, set_ or [])
    with progress_bar("caption") as advance:
        captions = run.caption(config, progress=advance)
    say(str(captions))
    root = () if data_root is None else ("--data-root", data_root)
    splits = [word for name in split or () for word in ("--split", name)]
    first = () if config.limit is None else ("--limit", str(config.limit))
    next_command(
        "mmdiff-cache", "extract", "--dataset", dataset, *root, *splits, *first, "--prompts", str(out)
    )
    if captions.unreadable:
        warn(
            f"{len(captions.unreadable)} pictures cannot be read and have no caption; 'extract' needs a line "
            f"for each, first {next(iter(captions.unreadable))!r}: add one, an empty prompt will do"
        )
        raise typer.Exit(SOME_FAILED)
