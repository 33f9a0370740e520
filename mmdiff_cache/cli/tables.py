"""Tables of `inspect`, and the same as JSON."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from rich.table import Table

from mmdiff_cache.cli.console import TRAIN, next_command, next_training, out, print_json, safe, say
from mmdiff_cache.config import data_folder
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.summary import (
    ArraySummary,
    LabelStatistics,
    MapStatistics,
    SplitStates,
    StoreEntry,
    StoreSummary,
    find_stores,
    summarize,
)

WIDEST = 10_000
"""Columns that a table of scores may have in a file or a pipe."""
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def show_stores(*, as_json: bool) -> None:
    """Every store under the data folder."""
    folder = data_folder()
    entries = find_stores(folder)
    if as_json:
        return print_json([dataclasses.asdict(entry) for entry in entries])
    if not entries:
        say(f"no stores under {folder.absolute()}")
        return next_command("mmdiff-cache", "extract", "--dataset", "scenes")
    table = new_table(
        "store", "data set", "backbone", "splits", "layers x t", "samples", "on disk", "raw/disk", "age"
    )
    for entry in entries:
        table.add_row(*map(safe, _cells(entry)))
    out.print(table)
    usable = next((entry for entry in entries if entry.fault is None), None)
    if usable is not None:
        next_command("mmdiff-cache", "inspect", usable.path)
    return None


def show_store(path: Path, *, as_json: bool) -> None:
    """One store in full. Raises StoreError where there is none."""
    store = open_store(path)
    summary = summarize(store)
    if as_json:
        return print_json(summary.to_json())
    say(str(store))
    _print("identity", facts_table({**summary.identity, **summary.provenance}))
    _print("samples", _samples(summary))
    _print("arrays", _arrays(summary.arrays))
    if summary.maps:
        _print("features, before the cast to float16", _maps(summary.maps))
    if summary.labels:
        _print("labels", _labels(summary.labels))
    if TRAIN in store.splits and summary.splits[TRAIN].done and summary.labels:
        label = min(store[TRAIN].label_specs.values(), key=lambda spec: spec.name)
        next_training(label.name, label.kind, path)
    return None


def show_bytes(count: float) -> str:
    """Bytes in decimal units."""
    power = min(int(math.log10(count) // 3), len(UNITS) - 1) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {UNITS[power]}"


def show_age(seconds: float) -> str:
    """Time since, in the largest fitting unit."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"


def new_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


class ScoreTable(Protocol):
    """Scores of trainings, as `sweep` and `compare` give them."""

    @property
    def protocols(self) -> Sequence[str]:
        """How they were taken."""
        ...

    def header(self) -> list[str]:
        """Titles of the cells."""
        ...

    def cells(self) -> list[list[str]]:
        """A line a row."""
        ...

    def by_task(self) -> Mapping[str, Self]:
        """The part of each task."""
        ...


def show_by_task(scores: ScoreTable) -> None:
    """A table a task, and how the scores were taken. Into a file or a pipe each row goes as one line."""
    parts = scores.by_task()
    for task, part in parts.items():
        out.print(f"\n[bold]{safe(task)}[/]" if len(parts) > 1 else "")
        table = new_table(*map(safe, part.header()))
        for row in part.cells():
            table.add_row(*map(safe, row))
        if out.is_terminal:
            out.print(table)
        else:
            _print_whole(table)
    if scores.protocols:
        say("\n" + "\n".join(scores.protocols))


def _print_whole(table: Table) -> None:
    before = out.width
    out.width = max(before, out.measure(table, options=out.options.update(max_width=WIDEST)).maximum)
    out.print(table)
    out.width = before


def _print(title: str, table: Table) -> None:
    out.print(f"\n[bold]{safe(title)}[/]")
    out.print(table)


def _cells(entry: StoreEntry) -> list[str]:
    if entry.fault is not None:
        return [entry.path, "cannot be opened:", entry.fault, "", "", "", "", "", show_age(entry.age_seconds)]
    failed = f", {entry.failed} failed" if entry.failed else ""
    return [
        entry.path,
        entry.dataset,
        entry.backbone,
        " ".join(entry.splits),
        f"{entry.layers} x {entry.timesteps}",
        f"{entry.done:,} of {entry.planned:,}{failed}",
        show_bytes(entry.disk_bytes),
        f"{entry.raw_bytes / entry.disk_bytes:.2f}" if entry.disk_bytes else "",
        show_age(entry.age_seconds),
    ]


def facts_table(facts: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in facts.items():
        table.add_row(f"[dim]{safe(name)}[/]", safe(str(value)))
    return table


def _samples(summary: StoreSummary) -> Table:
    table = new_table("split", "done", "planned", "failed", "pending")
    for split, states in summary.splits.items():
        table.add_row(
            safe(split),
            f"{states.done:,}",
            f"{states.planned:,}",
            f"{states.failed:,}",
            f"{states.pending:,}",
        )
        for line in _reasons(states):
            table.add_row("", line)
    return table


def _reasons(states: SplitStates, most: int = 5) -> list[str]:
    lines = [f"{sample}: {reason}" for sample, reason in list(states.reasons.items())[:most]]
    return [safe(line) for line in lines]


def _arrays(arrays: Sequence[ArraySummary]) -> Table:
    table = new_table("array", "type", "axes", "shape", "chunk", "shard", "codecs", "on disk", "raw/disk")
    for array in arrays:
        table.add_row(
            safe(array.path),
            array.dtype,
            " ".join(array.dims),
            _sides(array.shape),
            _sides(array.chunk),
            "" if array.shard is None else _sides(array.shard),
            safe(array.codec),
            show_bytes(array.disk_bytes),
            "" if array.ratio is None else f"{array.ratio:.2f}",
        )
    return table


def _sides(shape: Sequence[int]) -> str:
    return " ".join(map(str, shape))


def _maps(maps: Sequence[MapStatistics]) -> Table:
    table = new_table("t", "layer", "mean", "rms", "max", "entropy", "clipped", "flushed", "non-finite")
    for entry in maps:
        table.add_row(
            f"{entry.timestep:g}",
            safe(entry.layer),
            f"{entry.mean:.4f}",
            f"{entry.rms:.4f}",
            f"{entry.max_abs:.4g}",
            f"{entry.entropy:.3f}",
            f"{entry.clipped:,}",
            f"{entry.flushed:,}",
            f"{entry.non_finite:,}",
        )
    return table


def _labels(labels: Sequence[LabelStatistics]) -> Table:
    table = new_table("label", "kind", "split", "samples", "what the pixels are")
    for label in labels:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in label.shares.items())
        metres = (
            "" if label.low is None else f"{label.low:.2f} to {label.high:.2f} m, mean {label.mean:.2f} m; "
        )
        table.add_row(safe(label.name), label.kind, safe(label.split), f"{label.samples:,}", metres + shares)
    return table
