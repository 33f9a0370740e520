"""What the commands print with: two consoles, a progress bar with an ETA, and the closing line to paste."""

import json
import math
import shlex
import sys
import time
import unicodedata
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PIPE_WIDTH = 160
"""Columns of a table that goes into a file or a pipe."""

SECONDS_BETWEEN_LINES = 60.0
"""Of progress that goes into a file or a pipe."""

TRAIN = "train"
"""The split that is trained on."""

TASK_OF_KIND = {"classes": "segmentation", "mask": "saliency", "depth": "depth"}
"""What a label set of a kind is trained as."""

out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False)

Advance = Callable[[int, int, str], None]
"""Called with what is done, the total, and a few words on the present state."""


def clean(text: str) -> str:
    """Text from files without characters that steer a terminal; line breaks and tabs stay."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else "\ufffd" for c in text
    )


def safe(text: str) -> str:
    """Text from files as markup that shows it as it is."""
    return escape(clean(text))


def say(text: str) -> None:
    """Print text as it is: square brackets in names are not markup, long paths are not broken."""
    out.print(clean(text), markup=False, soft_wrap=True)


def fail(message: str) -> None:
    """One red line on standard error; further lines of the message are lines to type, printed as they are."""
    first, _, lines = message.partition("\n")
    err.print(f"[bold red]error:[/] [red]{safe(first)}[/]", soft_wrap=True)
    if lines:
        err.print(clean(lines), markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """One yellow line on standard error."""
    err.print(f"[bold yellow]warning:[/] {safe(message)}", soft_wrap=True)


def next_command(*words: str) -> None:
    """Close a command with the line to type next."""
    out.print(f"\n[dim]next:[/]  [bold]{safe(shlex.join(words))}[/]", soft_wrap=True)


def next_training(label: str, kind: str, store: Path) -> None:
    """The same, for a training on a label set of a store."""
    task = TASK_OF_KIND[kind]
    chosen = [] if label == task else ["--set", f"label={label}"]
    next_command("mmdiff-cache", "train", "--task", task, *chosen, "--store", str(store))


def print_json(value: Any) -> None:
    """Strict JSON; what is no finite number becomes null."""
    say(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress_bar(verb: str) -> Generator[Advance]:
    """A bar with counts, elapsed time and ETA on standard error; a line now and then where that is a file."""
    if not err.is_terminal:
        yield _lines(verb)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
        console=err,
    )
    with bar:
        task = bar.add_task(verb, total=None, state="")

        def advance(done: int, total: int, state: str = "") -> None:
            bar.update(task, completed=done, total=total, state=safe(state))

        yield advance


def _lines(verb: str) -> Advance:
    """Progress for a log: what a bar would say, as a line of its own, at most one a minute."""
    begun = last = time.monotonic()
    first: int | None = None

    def advance(done: int, total: int, state: str = "") -> None:
        nonlocal last, first
        now, first = time.monotonic(), done if first is None else first
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        pace = (done - first) / (now - begun)
        left = "unknown" if pace <= 0 else str(timedelta(seconds=round((total - done) / pace)))
        elapsed = timedelta(seconds=round(now - begun))
        line = f"{verb} {done:,} of {total:,}, {elapsed} elapsed, ETA {left}  {clean(state)}"
        err.print(line.rstrip(), markup=False, soft_wrap=True)

    return advance
