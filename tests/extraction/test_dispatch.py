"""Who gets which partition, and what becomes of it: on a crew in memory, whose misfortunes are scripted."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff_cache.errors import ClusterError, ExtractionError, StorageError
from mmdiff_cache.extraction import dispatch as module
from mmdiff_cache.extraction.dispatch import Crew, Died, Finished, Outcome, Task, Troubled, dispatch
from mmdiff_cache.store.records import partitions

DONE = Finished(samples=2, failed=(), size=10, seconds={})
PASSING = Troubled(reason="stale file handle", error=None, may_pass=True)
FULL = Troubled(reason="full", error=StorageError("no space left"), may_pass=False)


@dataclass
class Scripted(Crew):
    """Ends its oldest task at each wait; one that dies takes all others with it, as threads of a process."""

    places: int
    script: Callable[[Task], Outcome]
    under_way: list[Task] = field(default_factory=list)
    begun: list[Task] = field(default_factory=list)
    most: int = 0
    abandoned: int = 0

    def size(self) -> int:
        return self.places

    def submit(self, task: Task) -> None:
        assert task not in self.begun, "dask tells tasks apart by their key"
        self.begun.append(task)
        self.under_way.append(task)
        self.most = max(self.most, len(self.under_way))

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        if not self.under_way:
            return []
        ended = [(self.under_way[0], self.script(self.under_way[0]))]
        if isinstance(ended[0][1], Died):
            ended += [(task, Died()) for task in self.under_way[1:]]
        self.under_way = self.under_way[len(ended) :]
        return ended

    def abandon(self) -> None:
        self.abandoned += 1
        self.under_way.clear()


def tasks(count: int) -> list[Task]:
    return [Task(partition=partition) for partition in partitions("val", 2 * count, 2)]


def run(crew: Crew, count: int, settled: Callable[[Task, Outcome], None] | None = None) -> dict[str, str]:
    return dispatch(tasks(count), crew, settled or (lambda task, outcome: None), lambda state: None)


def finished(crew: Crew) -> set[int]:
    return {task.partition.index for task in crew.begun}


@settings(deadline=None)
@given(st.integers(4, 12), st.sets(st.integers(0, 11), max_size=2), st.integers(1, 5))
def test_exactly_the_poison_fails_whatever_died_beside_it(count: int, poison: set[int], places: int) -> None:
    """The first partitions are sound, so that the run is not given up as hopeless."""
    poison = {index for index in poison if 2 <= index < count}
    done: set[int] = set()

    def settled(task: Task, outcome: Outcome) -> None:
        if isinstance(outcome, Finished):
            assert task.partition.index not in done, "no partition is extracted twice"
            done.add(task.partition.index)

    crew = Scripted(places, lambda task: Died() if task.partition.index in poison else DONE)
    failed = run(crew, count, settled)
    assert sorted(failed) == [f"val-{index:06d}" for index in sorted(poison)]
    assert done == set(range(count)) - poison
    assert crew.most <= places
    assert not crew.abandoned


def test_suspects_run_alone_and_after_all_others() -> None:
    crew = Scripted(3, lambda task: Died() if task.partition.index == 1 else DONE)
    assert list(run(crew, 6)) == ["val-000001"]
    alone = [task.partition.index for task in crew.begun if task.alone]
    assert [task.alone for task in crew.begun] == sorted(task.alone for task in crew.begun)
    assert alone[0] == 1
    assert set(alone) == {1, 2, 3}


def test_a_trouble_that_passes_is_tried_again_and_costs_nothing() -> None:
    crew = Scripted(2, lambda task: PASSING if task.partition.index == 1 and task.attempt < 2 else DONE)
    assert run(crew, 4) == {}
    assert [task.attempt for task in crew.begun if task.partition.index == 1] == [0, 1, 2]


def test_a_trouble_that_stays_fails_its_partition_alone() -> None:
    crew = Scripted(2, lambda task: PASSING if task.partition.index == 1 else DONE)
    assert run(crew, 4) == {"val-000001": "stale file handle"}
    assert len(crew.begun) == 4 + module.RETRIES


def test_a_full_disk_begins_nothing_more_and_lets_the_others_end() -> None:
    ended: list[int] = []
    crew = Scripted(3, lambda task: FULL if task.partition.index == 0 else DONE)
    with pytest.raises(StorageError, match="no space left"):
        run(crew, 9, lambda task, outcome: ended.append(task.partition.index))
    assert finished(crew) == {0, 1, 2}
    assert ended == [0, 1, 2]
    assert not crew.abandoned


def test_a_run_that_only_fails_is_given_up() -> None:
    crew = Scripted(1, lambda task: Died())
    with pytest.raises(ExtractionError, match="the first 3 partitions all failed"):
        run(crew, 50)


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_ends_what_is_under_way_and_a_second_one_cuts_it(presses: int) -> None:
    ended: list[int] = []

    def settled(task: Task, outcome: Outcome) -> None:
        ended.append(task.partition.index)
        if len(ended) <= presses:
            os.kill(os.getpid(), signal.SIGINT)

    before, crew = signal.getsignal(signal.SIGINT), Scripted(3, lambda task: DONE)
    with pytest.raises(KeyboardInterrupt):
        run(crew, 9, settled)
    assert finished(crew) == {0, 1, 2}
    assert ended == ([0, 1, 2] if presses == 1 else [0, 1])
    assert crew.abandoned == presses - 1
    assert signal.getsignal(signal.SIGINT) is before


def test_what_takes_too_long_to_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAIN_SECONDS", 0.0)
    crew = Scripted(3, lambda task: FULL)
    with pytest.raises(StorageError):
        run(crew, 9)
    assert crew.abandoned == 1


def test_a_lost_crew_ends_the_run() -> None:
    def script(task: Task) -> Outcome:
        raise ClusterError("the scheduler was lost")

    with pytest.raises(ClusterError):
        run(Scripted(2, script), 4)


def test_an_empty_crew_is_waited_for() -> None:
    crew = Scripted(0, lambda task: DONE)
    sizes = iter([0, 0, 2, 2, 2, 2])
    crew.size = lambda: next(sizes)  # type: ignore[method-assign]
    assert run(crew, 2) == {}
