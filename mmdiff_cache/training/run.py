"""Trains heads from a store and nothing else: `train(TrainConfig(task="depth"))` gives a run folder.

The same configuration and seed give the same weights, bit for bit, on the same CPU with the same number of
threads, whether or not the training was interrupted and continued.
"""

import shlex
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.errors import CheckpointError, ConfigError, StoreError
from mmdiff_cache.records import Progress
from mmdiff_cache.store.files import storage_errors
from mmdiff_cache.store.manifest import MANIFEST, Manifest, read_manifest
from mmdiff_cache.store.reader import Store, open_store
from mmdiff_cache.tasks import find_task, headline
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.build import Model, Setup, build_model, set_up, spec_from_json
from mmdiff_cache.training.checkpoint import BEST, EMA, LAST, RAW
from mmdiff_cache.training.folder import (
    CONFIG,
    ENVIRONMENT,
    LOG,
    STORE,
    environment,
    locked,
    logging_to,
    new_folder,
    open_folder,
    read_metrics,
)
from mmdiff_cache.training.loop import Reading, run_loop
from mmdiff_cache.training.random_state import own_random_state
from mmdiff_cache.training.resolve import encoder_hashes, pick_device, resolve
from mmdiff_cache.training.trainer import Trainer, View, itself

FREE_TO_DIFFER = ("run", "stores", "device", "memory")
"""Fields that say where a training runs, not what it computes."""
WEIGHTS: Mapping[str, tuple[str, str]] = {EMA: (LAST, EMA), RAW: (LAST, RAW), "best": (BEST, EMA)}
"""File and group of the weights that can be asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A training on disk, finished or not."""

    path: Path
    config: TrainConfig
    """Resolved."""
    origin: Mapping[str, str]
    """Data set, backbone, prompts and fingerprint of the store it was trained on."""
    step: int
    """Steps that the last checkpoint has done."""
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Last scores on the held-out samples, by weights: `ema`, and `raw` once it has finished."""

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= filled(self.config.steps)

    def __str__(self) -> str:
        state = "finished" if self.finished else f"stopped at step {self.step}"
        lines = [
            f"{self.path}",
            f"  {self.config.task} on {self.origin['dataset']}, features of {self.origin['backbone']}, "
            f"{filled(self.config.steps)} steps of {self.config.batch_size}, {state}",
        ]
        name = headline(find_task(self.config.task, self.config.label), self.origin["dataset"])
        for weights, scores in self.scores.items():
            value = scores.get(name)
            lines.append(
                f"  held-out {name}, {weights} weights: {'none' if value is None else f'{value:.4f}'}"
            )
        return "\n".join(lines)


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
    )


def model_for_run(run: "Run | str | Path", weights: str = EMA) -> Model:
    """A run's model in evaluation mode, on the CPU. Weights: `ema`, `raw` or `best`.

    Raises ConfigError for other weights, CheckpointError for a checkpoint that cannot be used.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    name, group = WEIGHTS[weights]
    path = load_run(run).path / name
    spec = spec_from_json(checkpoint.read_header(path).spec)
    with torch.device("meta"):  # a spec that asks for more than the file holds costs no memory
        checkpoint.check_shapes(build_model(spec), path, group)
    with own_random_state():
        model = build_model(spec)
    checkpoint.load_weights(model, path, group)
    return model.requires_grad_(False).eval()


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
    for name, value in encoder_hashes(store, run.config.discriminative).items():
        if run.origin.get(name) != value:
            raise CheckpointError(
                f"{run.path} was trained with {name} {run.origin.get(name)}, {folder} has {value}; name the "
                "former store, or train again"
            )
    return store


def _keep_manifest(store: Store, folder: Path) -> None:
    """Copy what a store says about itself, so that the run can be applied when the store is gone."""
    with storage_errors(folder):
        shutil.copyfile(store.path / MANIFEST, folder / STORE)


def kept_manifest(run: Run) -> Manifest:
    """What the store of a run says about itself. Raises CheckpointError where the run has lost it."""
    try:
        return read_manifest(run.path, STORE)
    except StoreError as error:
        raise CheckpointError(f"{run.path} is not complete: {error}") from error


def train(config: TrainConfig, progress: Progress | None = None) -> Run:
    """Train, or go on with the training in `config.run` if it was interrupted; safe to run again.

    `progress` is called with steps done, all steps, and the loss and speed. Ends with checkpoints and
    held-out scores in the run folder. Raises ConfigError for a choice that cannot be, CheckpointError for a
    run that does not fit the configuration or the store, StoreError for a store that cannot be read,
    TrainingError for a loss that is no number. An interruption carries, as its note, the line that goes on.
    """
    setup = set_up(resolve(config))
    with opened(setup, _claim(setup)) as trainer, flushing_denormals():
        samples, held_out = trainer.setup.samples, trainer.setup.held_out
        reading = Reading(
            samples=samples,
            held_out=held_out,
            batch_size=trainer.batch_size,
            seed=trainer.config.reading_seed,
        )
        try:
            failures = run_loop([trainer], reading, progress or _silent)
        except KeyboardInterrupt as stop:
            stop.add_note(f"mmdiff-cache train --config {shlex.quote(str(trainer.folder / CONFIG))}")
            raise
    for failure in failures.values():
        raise failure
    return load_run(trainer.folder)


@contextmanager
def opened(setup: Setup, folder: Path, view: View = itself) -> Generator[Trainer]:
    """A training in its folder, locked: a new one, or at the step where it stopped."""
    setup = replace(setup, config=replace(setup.config, run=str(folder)))
    with locked(folder), logging_to(folder / LOG):
        trainer = Trainer(setup, folder, view)
        if (folder / LAST).exists():
            trainer.go_on()
        else:
            checkpoint.write_json(folder / CONFIG, setup.config.to_json())
            checkpoint.write_json(folder / ENVIRONMENT, environment(setup.config.device))
            _keep_manifest(setup.store, folder)
        trainer.begin()
        yield trainer


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
        return new_folder(f"{config.task}-{setup.origin.dataset}-{setup.origin.backbone}")
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
