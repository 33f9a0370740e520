"""Hands partitions out to workers, and decides what becomes of each that comes back. Knows no dask.

A partition that comes back with a passing trouble is tried again; one that a full disk refused ends the run,
once the others under way have ended. A worker that dies takes down all the partitions it had, guilty or not:
each of them is a suspect, and suspects run alone, after all others. Only what dies alone has failed.
"""

import logging
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

from mmdiff_cache.errors import ExtractionError, MMDiffError
from mmdiff_cache.extraction.profile import Part
from mmdiff_cache.store.records import Partition

logger = logging.getLogger(__name__)

RETRIES = 2
"""How often a partition is tried again after a trouble that may pass."""
HOPELESS = 3
"""A run whose first so many partitions all failed is given up."""
DRAIN_SECONDS = 600.0
"""How long partitions under way may take to end, when a run stops."""
GLANCE_SECONDS = 0.5
"""How soon Ctrl-C is noticed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One partition to extract, and how often that was tried."""

    partition: Partition
    again: bool = False
    """Extract it although it has a valid record."""
    attempt: int = 0
    alone: bool = False
    """It was under way when a worker died: nothing else may run beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A partition is in the store."""

    samples: int
    failed: tuple[tuple[str, str], ...]
    """Samples that could not be used, each with the reason."""
    size: int
    """Bytes of its files."""
    seconds: Mapping[Part, float]
    """Where the time of its worker went since the last answer; zeros where nobody asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Troubled:
    """A partition could not be extracted, and its worker lived to say why."""

    reason: str
    error: MMDiffError | None
    """One that a user can act on: it ends the run, unless it may pass."""
    may_pass: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Died:
    """The worker died that had this partition and perhaps others, or hung and was ended."""


Outcome = Finished | Troubled | Died


class Crew(ABC):
    """Workers, however they are reached."""

    @abstractmethod
    def size(self) -> int:
        """How many partitions they take at once, at present. Raises ClusterError when they are lost."""

    @abstractmethod
    def submit(self, task: Task) -> None:
        """Begin a task."""

    @abstractmethod
    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        """What has ended, after some seconds at the latest. Raises ClusterError when the crew is lost."""

    @abstractmethod
    def abandon(self) -> None:
        """Give up all tasks under way."""


class Board:
    """What is waiting, under way, suspect and failed."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._waiting, self._suspects = deque(tasks), deque[Task]()
        self.under_way: set[Task] = set()
        self.finished = 0
        self.failed: dict[str, str] = {}
        """Reasons, by name of the partition."""
        self.error: MMDiffError | None = None
        """What ends the run."""

    @property
    def over(self) -> bool:
        """Whether nothing is left, or nothing more is to be begun."""
        return self.error is not None or not (self._waiting or self._suspects or self.under_way)

    def take(self, places: int) -> Generator[Task]:
        """The tasks to begin now, with so many places in all; a suspect only when all else has ended."""
        while self._waiting and len(self.under_way) < places:
            task = self._waiting.popleft()
            self.under_way.add(task)
            yield task
        if not self._waiting and not self.under_way and self._suspects and places:
            task = self._suspects.popleft()
            self.under_way.add(task)
            yield task

    def settle(self, task: Task, outcome: Outcome) -> None:
        """Take note of how a task ended."""
        self.under_way.remove(task)
        again = replace(task, attempt=task.attempt + 1)
        match outcome:
            case Finished():
                self.finished += 1
            case Died() if task.alone:
                self._fail(task, "the process that extracted it died or hung each time, alone at last")
            case Died():
                logger.warning("partition %s lost its worker; it is tried again, alone", task.partition.name)
                self._suspects.append(replace(again, alone=True))
            case Troubled(may_pass=True) if task.attempt < RETRIES:
                logger.warning("partition %s is tried again: %s", task.partition.name, outcome.reason)
                (self._suspects if task.alone else self._waiting).append(again)
            case Troubled(error=MMDiffError() as error):
                self.error = self.error or error
            case Troubled():
                self._fail(task, outcome.reason)

    def _fail(self, task: Task, reason: str) -> None:
        logger.warning("partition %s failed: %s", task.partition.name, reason)
        self.failed[task.partition.name] = reason
        if len(self.failed) >= HOPELESS and not self.finished:
            self.error = ExtractionError(f"the first {len(self.failed)} partitions all failed: {reason}")


def dispatch(
    tasks: Iterable[Task], crew: Crew, settled: Callable[[Task, Outcome], None], say: Callable[[str], None]
) -> dict[str, str]:
    """Have all tasks done, and return the reasons of those partitions that failed, by name.

    No more tasks are under way than the crew has places. `settled` is called after each task, `say` with
    what a run that stops is waiting for. Ctrl-C stops it: what is under way ends first, for DRAIN_SECONDS at
    most; a second one cuts it short. Raises KeyboardInterrupt then, the MMDiffError that ended the run,
    and ClusterError when the crew is lost.
    """
    board = Board(tasks)
    with _interrupts() as pressed:
        try:
            while not board.over and not pressed():
                for task in board.take(crew.size()):
                    crew.submit(task)
                _collect(board, crew, settled)
            _drain(board, crew, settled, say)
        except BaseException:
            crew.abandon()
            raise
        if pressed():
            raise KeyboardInterrupt
    if board.error is not None:
        raise board.error
    return board.failed


def _collect(board: Board, crew: Crew, settled: Callable[[Task, Outcome], None]) -> None:
    for task, outcome in crew.wait(GLANCE_SECONDS):
        board.settle(task, outcome)
        settled(task, outcome)


def _drain(
    board: Board, crew: Crew, settled: Callable[[Task, Outcome], None], say: Callable[[str], None]
) -> None:
    """Let what is under way end; what takes too long is given up, and is extracted by the next run."""
    begun = time.monotonic()
    while board.under_way:
        left = DRAIN_SECONDS - (time.monotonic() - begun)
        if left <= 0:
            logger.warning("%d partitions took too long to end and are given up", len(board.under_way))
            return crew.abandon()
        crew.size()  # raises when nobody is left to wait for
        say(f"stopping: {len(board.under_way)} partitions end within {left:.0f} s; Ctrl-C again cuts them")
        _collect(board, crew, settled)
    return None


@contextmanager
def _interrupts() -> Generator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; from the second time on it is a KeyboardInterrupt, as elsewhere."""
    presses = 0

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # so it is for what a shell runs behind
    if ignored or threading.current_thread() is not threading.main_thread():  # others hear no signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)
