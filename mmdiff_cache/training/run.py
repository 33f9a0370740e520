"""Trains heads from a store and nothing else: `train(TrainConfig(task="depth"))` gives a run folder.

The same configuration and seed give the same weights, bit for bit, on the same CPU with the same number of
threads, whether or not the training was interrupted and continued.
"""

import shlex
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.errors import CheckpointError, ConfigError, StoreError
from mmdiff_cache.records import Progress
from mmdiff_cache.store.manifest import MANIFEST, Manifest, read_manifest
from mmdiff_cache.store.reader import Store, open_store
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.build import Model, Setup, build_model, for_task, spec_from_json
from mmdiff_cache.training.checkpoint import BEST, EMA, LAST, RAW
from mmdiff_cache.training.environment import environment, note_environment
from mmdiff_cache.training.folder import (
    CONFIG,
    ENVIRONMENT,
    LOG,
    PICTURES,
    STORE,
    clear_partial,
    clear_start,
    locked,
    logging_to,
    new_folder,
    open_folder,
    read_metrics,
    working,
)
from mmdiff_cache.training.loop import Reading, run_loop
from mmdiff_cache.training.plan import TrainingPlan, plan
from mmdiff_cache.training.protocol import features_in_words
from mmdiff_cache.training.random_state import own_random_state
from mmdiff_cache.training.resolve import guidance_identity, pick_device
from mmdiff_cache.training.trainer import Share, Trainer, has_waited, waited_for
from mmdiff_cache.training.unified import judge, part, task_names

FREE_TO_DIFFER = ("run", "stores", "device", "compile", "memory")
"""Fields that say where and how a training runs, not what it computes."""
WEIGHTS: Mapping[str, tuple[str, str]] = {EMA: (LAST, EMA), RAW: (LAST, RAW), "best": (BEST, EMA)}
"""File and group of the weights that can be asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A training on disk, finished or not."""

    path: Path
    config: TrainConfig
    """Resolved."""
    origin: Mapping[str, Any]
    """Data set, backbone, prompts, fingerprint of the store it was trained on; of several tasks by task."""
    step: int
    """Steps that the last checkpoint has done."""
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Last scores on the held-out samples, by weights: `ema` and `raw`; of several tasks each by task."""
    checks_since_best: int = 0
    """Checks of the held-out samples since the best one."""
    manifest: str = STORE
    """Name of the file with the manifest of its store."""

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or it has stopped early."""
        return self.step >= filled(self.config.steps) or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether it ended because the held-out score got no better (`patience`)."""
        return self.step < filled(self.config.steps) and has_waited(
            self.config.patience, self.checks_since_best
        )

    @property
    def headline(self) -> str:
        """The score that it is judged by; of several tasks what stands for their mean."""
        return judge(self.config, self.origin.get("dataset", ""))

    @property
    def ending(self) -> str:
        """How far it came and why it went no further, in words."""
        if self.stopped_early:
            return f"stopped early at step {self.step}: {waited_for(self.checks_since_best, self.headline)}"
        return "finished" if self.finished else f"stopped at step {self.step}"

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it was trained for."""
        return task_names(self.config)

    def for_task(self, task: str) -> "Run":
        """A run of several tasks as it serves one of them; one of a single task is itself.

        Raises ConfigError for a task that it was not trained for.
        """
        config = part(self.config, task)
        if config is self.config:
            return self
        return replace(
            self,
            config=config,
            origin=self.origin[task],
            scores={weights: found[task] for weights, found in self.scores.items()},
            manifest=manifest_name(self.config, task),
        )

    def __str__(self) -> str:
        lines = [f"{self.path}", *(_lines(self.for_task(task)) for task in self.tasks)]
        if (self.path / PICTURES).is_dir():
            lines.append(f"  pictures {self.path / PICTURES}")
        return "\n".join(lines)


def _lines(run: Run) -> str:
    """A run of one task, without its folder."""
    lines = [
        f"  {run.config.task} on {run.origin['dataset']}, "
        f"{features_in_words(run.origin['backbone'], run.origin['prompts'])}, "
        f"{filled(run.config.steps)} steps of {run.config.batch_size}, {run.ending}"
    ]
    for weights, scores in run.scores.items():
        value = scores.get(run.headline)
        shown = "none" if value is None else f"{value:.4f}"
        lines.append(f"  held-out {run.headline}, {weights} weights: {shown}")
    return "\n".join(lines)


def manifest_name(config: TrainConfig, task: str) -> str:
    """The file in a run's folder that keeps what the store of a task says about itself."""
    return STORE if len(task_names(config)) == 1 else f"store-{task}.json"


def load_run(path: "Run | str | Path") -> Run:
    """Open a run folder. Raises CheckpointError if it holds no checkpoint that can be read."""
    if isinstance(path, Run):
        return path
    folder = Path(path).expanduser().absolute()
    header = checkpoint.read_header(folder / LAST)
    try:
        config = TrainConfig.from_json(header.config)
    except ConfigError as error:
        raise CheckpointError(
            f"{folder / LAST} was written with a configuration this code cannot read: {error}"
        ) from error
    held_out = [line["held_out"] for line in read_metrics(folder) if "held_out" in line]
    return Run(
        path=folder,
        config=replace(config, run=str(folder)),
        origin=header.store,
        step=header.step,
        scores=held_out[-1] if held_out else {},
        checks_since_best=header.checks_since_best,
    )


def one_task(run: "Run | str | Path", task: str | None) -> Run:
    """A run as it serves one task, which must be named where there are several. Raises ConfigError."""
    run = load_run(run)
    if task is None and len(run.tasks) > 1:
        raise ConfigError(
            f"{run.path} was trained for {', '.join(run.tasks)}; choose one of them with --task"
        )
    return run if task is None else run.for_task(task)


def weights_of(run: "Run | str | Path", weights: str) -> tuple[Path, str]:
    """The file with weights of a run, `ema`, `raw` or `best`, and their group in it.

    Raises ConfigError for weights there are not.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    name, group = WEIGHTS[weights]
    run = load_run(run)
    if name == BEST and not (run.path / name).exists():
        raise ConfigError(
            f"{run.path} has no best weights: no check of held-out samples has had a score "
            f"(holdout is {run.config.holdout:g}); take --weights {EMA} or {RAW}"
        )
    return run.path / name, group


def model_for_run(run: "Run | str | Path", weights: str = EMA) -> Model:
    """A run's model in evaluation mode, on the CPU. Weights: `ema`, `raw` or `best`.

    Raises ConfigError for weights there are not, CheckpointError for a checkpoint that cannot be used.
    """
    run = load_run(run)
    path, group = weights_of(run, weights)
    spec = spec_from_json(checkpoint.read_header(path).spec)
    with torch.device("meta"):  # a spec that asks for more than the file holds costs no memory
        checkpoint.check_shapes(build_model(spec), path, group)
    with own_random_state():
        model = build_model(spec)
    checkpoint.load_weights(model, path, group)
    return for_task(model.requires_grad_(False).eval(), run.config.task)


def device_of(run: Run) -> str:
    """The device that a run was trained on, or the CPU on a machine that has no such device."""
    try:
        return pick_device(run.config.device)
    except ConfigError:
        return "cpu"


def store_of(run: Run, path: str | Path | None = None) -> Store:
    """The store that a run was trained on, at `path` if it was moved.

    Raises StoreError where there is none, CheckpointError where another one lies there.
    """
    folder = Path(path or run.config.stores[0]).expanduser()
    try:
        store = open_store(folder)
    except StoreError as error:
        if path is None and not folder.exists():
            raise StoreError(
                f"the store of {run.path} is no longer at {folder}; say where it is with --store"
            ) from error
        raise
    if store.manifest.fingerprint != run.origin["fingerprint"]:
        raise CheckpointError(
            f"{run.path} was trained on a store with identity {run.origin['fingerprint'][:12]}, {folder} has "
            f"{store.manifest.fingerprint[:12]}; name the former store, or train again"
        )
    for name, value in guidance_identity(store, run.config).items():
        if run.origin.get(name, value) != value:  # an earlier release did not write all of them down
            raise CheckpointError(
                f"{run.path} was trained with {name} {run.origin[name]}, {folder} has {value}; name the "
                "former store, or train again"
            )
    return store


def _keep_manifest(store: Store, path: Path) -> None:
    """Copy what a store says about itself, so that the run can be applied when the store is gone."""
    checkpoint.write_bytes(path, (store.path / MANIFEST).read_bytes())


def kept_manifest(run: Run) -> Manifest:
    """What the store of a run says about itself. Raises CheckpointError where the run has lost it."""
    try:
        return read_manifest(run.path, run.manifest)
    except StoreError as error:
        raise CheckpointError(f"{run.path} is not complete: {error}") from error


def train(config: TrainConfig | TrainingPlan, progress: Progress | None = None) -> Run:
    """Train, or go on with the training in `config.run` if it was interrupted; safe to run again.

    A plan (`plan.plan`) is trained as it was printed.

    `progress` is called with steps done, all steps, and the loss and speed. Ends with checkpoints and
    held-out scores in the run folder. Raises ConfigError for a choice that cannot be, CheckpointError for a
    run that does not fit the configuration or the store, StoreError for a store that cannot be read,
    TrainingError for a loss or gradient that is no number, DataError for a label that is none, StorageError
    for a disk that refuses: the last checkpoint stays, and the same call goes on from it. An interruption
    carries, as its note, the line that goes on.
    """
    setup = (config if isinstance(config, TrainingPlan) else plan(config)).setup
    with opened(setup, _claim(setup)) as trainer, flushing_denormals():
        try:
            failures = run_loop([trainer], Reading.of(trainer.setup), progress or _silent)
        except KeyboardInterrupt as stop:
            stop.add_note(f"mmdiff-cache train --config {shlex.quote(str(trainer.folder / CONFIG))}")
            raise
    for failure in failures.values():
        raise failure
    return load_run(trainer.folder)


@contextmanager
def opened(setup: Setup, folder: Path, shares: Sequence[Share] = ()) -> Generator[Trainer]:
    """A training in its folder, locked: a new one, or at the step where it stopped."""
    setup = replace(setup, config=replace(setup.config, run=str(folder)))
    with locked(folder), logging_to(folder / LOG):
        with working(folder):
            trainer = _made(setup, folder, shares)
        try:
            yield trainer
        finally:
            trainer.end()


def _made(setup: Setup, folder: Path, shares: Sequence[Share]) -> Trainer:
    clear_partial(folder)
    trainer = Trainer(setup, folder, shares)
    if (folder / LAST).exists():
        trainer.go_on()
        if not trainer.finished:
            note_environment(folder / ENVIRONMENT, setup.config.device, trainer.step)
    else:
        clear_start(folder)
        checkpoint.write_json(folder / CONFIG, setup.config.to_json())
        checkpoint.write_json(folder / ENVIRONMENT, environment(setup.config.device))
        for one in setup.parts:
            _keep_manifest(one.store, folder / manifest_name(setup.config, one.task.name))
    trainer.begin()
    return trainer


@contextmanager
def flushing_denormals() -> Generator[None]:
    """Count numbers too small to matter as zero: on a CPU each would cost a hundred times a normal one."""
    for kind in ("float32", "float64"):
        np.finfo(kind)  # numpy looks at the smallest numbers once, and warns if they are zero by then
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _claim(setup: Setup) -> Path:
    """The run's folder: a new one, or the one asked for if it is free or holds this very training."""
    config = setup.config
    if config.run is None:
        origins = [part.origin for part in setup.parts]
        datasets = "+".join(dict.fromkeys(one.dataset for one in origins))
        return new_folder(f"{config.task}-{datasets}-{origins[0].backbone}")
    folder = Path(config.run)
    if open_folder(folder) and (folder / LAST).exists():
        _check_same(load_run(folder).config, config, folder)
    return folder


def _check_same(stored: TrainConfig, asked: TrainConfig, folder: Path) -> None:
    for entry in fields(TrainConfig):
        have, want = getattr(stored, entry.name), getattr(asked, entry.name)
        if entry.name not in FREE_TO_DIFFER and have != want:
            raise ConfigError(
                f"{folder} was trained with {entry.name} = {have}, {want} was asked; go on with "
                f"--config {folder / CONFIG}, or choose another --run"
            )


def _silent(done: int, total: int, state: str) -> None:
    """No progress wanted."""
