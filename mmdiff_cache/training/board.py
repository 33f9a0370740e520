"""A training's curves for TensorBoard, beside metrics.jsonl, which stays the record.

The events go through TensorBoard's own record writer, in this thread and at once: its writer of summaries has
a thread of its own that dies with a traceback on a full disk.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from itertools import count
from pathlib import Path
from time import time
from typing import Any

from mmdiff_cache.training.folder import BOARD

logger = logging.getLogger(__name__)

NAME = "events.out.tfevents.{:010d}"
"""Of an event file: numbered, where TensorBoard's own names hold the time, since a clock can be set back."""


class Board:
    """The event files of a run. `after` is the step that it goes on from: what lies behind it is purged.

    A file is begun with the first curve. A disk that refuses costs the curves from there on, not the
    training.
    """

    def __init__(self, run: Path, after: int) -> None:
        self._folder, self._after = run / BOARD, after
        self._file: Any = None
        self._lost = False

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One point on each of the curves."""
        summaries = _messages("summary_pb2")
        points = [summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(_event(step=step, summary=summaries.Summary(value=points)))

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            with suppress(OSError):  # what a full disk did not take
                self._file.close()
            self._file = None

    def _write(self, event: bytes) -> None:
        if self._lost:
            return
        try:
            if self._file is None:
                self._file = self._begin()
            self._file.write(event)
            self._file.flush()
        except OSError as error:
            logger.warning("no more curves for TensorBoard in this run: %s", error)
            self._lost = True
            self.close()

    def _begin(self) -> Any:
        """A new file behind those that are there; TensorBoard reads them in the order of their names."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(exist_ok=True)
        there = {entry.name for entry in self._folder.iterdir()}
        number = next(n for n in count() if NAME.format(n) not in there)
        file = RecordWriter(open(self._folder / NAME.format(number), "xb"))  # noqa: SIM115
        file.write(_event(file_version="brain.Event:2"))
        if number:
            log = _messages("event_pb2").SessionLog
            file.write(_event(step=self._after + 1, session_log=log(status=log.START)))
        return file


def _event(**values: Any) -> bytes:
    """One event of this moment, as a file holds it."""
    return _messages("event_pb2").Event(wall_time=time(), **values).SerializeToString()


def _messages(name: str) -> Any:
    """A module of generated message classes, loaded when a curve is written, not with the package."""
    return import_module(f"tensorboard.compat.proto.{name}")
