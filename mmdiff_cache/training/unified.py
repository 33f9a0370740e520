"""Several tasks in one training: whose batch comes when, and what each loss counts. Paper: App. C.

A unified run is written `task="segmentation+depth"`, with a store for each task, or one that has all labels.
Each step takes a batch of one task; the others' heads get no gradient in it.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.datasets.prompts import FROM_FILE
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.tasks import find_task, headline

JOIN = "+"
"""Between the names of the tasks of a unified run."""
VOCABULARY = "unified"
"""The concepts that guide a unified run by default."""


def task_names(config: TrainConfig) -> tuple[str, ...]:
    """The tasks of a training, one or several. Raises ConfigError for one that is named twice."""
    names = tuple(name.strip() for name in config.task.split(JOIN))
    if len(set(names)) < len(names):
        raise ConfigError(f"task {config.task!r} names a task twice")
    return names


def judge(config: TrainConfig, dataset: str) -> str:
    """The name of what checks are judged by: the headline score; of several tasks their mean."""
    if len(task_names(config)) > 1:
        return "mean of the headline scores"
    return headline(find_task(config.task, config.label), dataset)


def part(config: TrainConfig, task: str) -> TrainConfig:
    """A training's configuration as one of its tasks alone would have it; that of one task is its own."""
    names = task_names(config)
    if task not in names:
        raise ConfigError(f"the run was trained for {', '.join(names)}, not for {task!r}")
    if len(names) == 1:
        return config
    if config.label is not None:
        raise ConfigError("label cannot be chosen for several tasks at once; leave it out")
    if len(config.stores) not in (0, 1, len(names)):
        raise ConfigError(
            f"{len(names)} tasks need a store each, or one that has all labels, got {len(config.stores)}"
        )
    stores = config.stores if len(config.stores) < 2 else (config.stores[names.index(task)],)
    return dataclasses.replace(
        config,
        task=task,
        stores=stores,
        concepts=config.concepts or (VOCABULARY if config.source == "hidden_states" else None),
        mixing=None,
        loss_weights=None,
        disjoint=False,
    )


def parts(config: TrainConfig) -> tuple[TrainConfig, ...]:
    """The configuration of every task of a training."""
    return tuple(part(config, task) for task in task_names(config))


def check_same_identity(identities: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConfigError unless all stores, named by their folders, were extracted in the same way.

    Prompts out of a file are the same way, whichever file: each data set has captions of its own.
    """
    first, *others = identities
    for other in others:
        have, want = (
            {**identities[path], "prompts": _kind_of_prompts(identities[path])} for path in (first, other)
        )
        for name in [*have, *(name for name in want if name not in have)]:
            if have.get(name) != want.get(name):
                raise ConfigError(
                    f"one model cannot learn from {first} and {other}: their {name} is {have.get(name)} "
                    f"and {want.get(name)}; extract both in the same way"
                )


def _kind_of_prompts(identity: Mapping[str, Any]) -> str | None:
    """A rule's name, or for any file the same."""
    prompts = identity.get("prompts")
    return "a file" if str(prompts).startswith(FROM_FILE) else prompts


def turns(ratio: Sequence[float], start: int, stop: int) -> Iterator[int]:
    """Whose turn it is at steps `start` to `stop - 1`, as positions in `ratio`.

    At any moment each has had its share of the steps to less than one; the first of equals comes first.
    """
    share = [value / sum(ratio) for value in ratio]
    had = [0] * len(share)
    for step in range(stop):
        owed = [part * (step + 1) - count for part, count in zip(share, had, strict=True)]
        chosen = owed.index(max(owed))
        had[chosen] += 1
        if step >= start:
            yield chosen


class Balance:
    """What the loss of each task counts: 1 / its mean over its first steps, and from then on that.

    While the mean is taken it is the mean so far. Given weights are kept as they are.
    """

    def __init__(self, tasks: Sequence[str], steps: int, weights: Sequence[float] | None = None) -> None:
        self.tasks, self.steps = tuple(tasks), steps
        self._given = None if weights is None else dict(zip(tasks, weights, strict=True))
        self._sums = torch.zeros(len(self.tasks), dtype=torch.float64)
        self._counts = torch.zeros(len(self.tasks), dtype=torch.int64)

    def weight(self, task: str, loss: float) -> float:
        """What a task's loss counts at this step; `loss` is its value, unweighted and finite."""
        if len(self.tasks) == 1:
            return 1.0
        if self._given is not None:
            return self._given[task]
        at = self.tasks.index(task)
        if self._counts[at] < self.steps:
            self._sums[at] += loss
            self._counts[at] += 1
        mean = float(self._sums[at] / self._counts[at])
        return 1.0 / mean if mean > 0 else 1.0

    def pack(self) -> dict[str, Tensor]:
        """The state as tensors, for a checkpoint."""
        return {"sums": self._sums, "counts": self._counts}

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `pack` gave."""
        self._sums, self._counts = tensors["sums"].clone(), tensors["counts"].clone()
