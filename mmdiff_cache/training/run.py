"""Trains heads from a store and nothing else: `train(TrainConfig(task="depth"))` gives a run folder.

The same configuration and seed give the same weights, bit for bit, on the same CPU with the same number of
threads, whether or not the training was interrupted and continued.
"""

import logging
import time
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from mmdiff_cache.config import TrainConfig, filled
from mmdiff_cache.errors import CheckpointError, ConfigError, StoreError, TrainingError
from mmdiff_cache.loader import Batch, make_loader
from mmdiff_cache.records import Progress
from mmdiff_cache.store.reader import Store, open_store
from mmdiff_cache.tasks import better, find_task, headline

from . import checkpoint
from .build import Model, Setup, build_model, set_up, spec_from_json, spec_to_json
from .checkpoint import BEST, EMA, LAST, OPTIMISER, RAW, RNG, Header
from .ema import Ema
from .folder import (
    CONFIG,
    ENVIRONMENT,
    LOG,
    append_metrics,
    cut_metrics,
    environment,
    locked,
    logging_to,
    new_folder,
    open_folder,
    read_metrics,
)
from .optim import make_optimizer, make_schedule
from .resolve import resolve
from .scoring import forward_batch, model_predictor, score

logger = logging.getLogger(__name__)

CHECKS = 10
"""Times in a training that the held-out samples are scored and a checkpoint is written."""
SECONDS_BETWEEN_CHECKPOINTS = 300.0
"""At least as often a checkpoint is written, so that a long training loses little."""
LOG_LINES = 200
"""Losses written to the metrics over a whole training."""
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
    """Scores on the held-out samples at the last checkpoint, by weights: `ema`, and `raw` once it has
    finished.
    """

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
        name = headline(find_task(self.config.task), self.origin["dataset"])
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
    """A run's model in evaluation mode, on the CPU; its `spec` says what it takes. Weights: `ema`, `raw` or
    `best`.

    Raises ConfigError for other weights, CheckpointError for a checkpoint that cannot be used.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    name, group = WEIGHTS[weights]
    path = load_run(run).path / name
    with own_random_state():
        model = build_model(spec_from_json(checkpoint.read_header(path).spec))
    checkpoint.load_weights(model, path, group)
    return model.requires_grad_(False).eval()


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
    return store


def train(config: TrainConfig, progress: Progress | None = None) -> Run:
    """Train, or go on with the training in `config.run` if it was interrupted; safe to run again.

    `progress` is called with steps done, all steps, and the loss and speed. Ends with checkpoints and
    held-out scores in the run folder. Raises ConfigError for a choice that cannot be, CheckpointError for a
    run that does not fit the configuration or the store, StoreError for a store that cannot be read,
    TrainingError for a loss that is no number.
    """
    config = resolve(config)
    setup = set_up(config)
    folder = _claim(setup)
    setup = replace(setup, config=replace(config, run=str(folder)))
    with locked(folder), logging_to(folder / LOG), own_random_state(), flushing_denormals():
        torch.manual_seed(config.seed)
        trainer = Trainer(setup, folder)
        if (folder / LAST).exists():
            trainer.go_on()
        else:
            checkpoint.write_json(folder / CONFIG, setup.config.to_json())
            checkpoint.write_json(folder / ENVIRONMENT, environment(config.device))
        trainer.run(progress or _silent)
    return load_run(folder)


def own_random_state() -> AbstractContextManager[None]:
    """Leave torch's generators as they were: a caller's random numbers do not depend on ours."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


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


class Trainer:
    """The state of one training: weights, their average, the optimiser, the step."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self.folder, self.config = setup, folder, setup.config
        self.steps, self.batch_size = filled(self.config.steps), filled(self.config.batch_size)
        self.device = torch.device(self.config.device)
        self.model: Model = build_model(setup.spec).to(self.device).train()
        self.ema: Ema[Model] = Ema(self.model, self.config.ema)
        self.optimiser: AdamW = make_optimizer(
            self.model,
            learning_rate=self.config.learning_rate,
            decoder_rate=self.config.decoder_rate,
            weight_decay=self.config.weight_decay,
        )
        self.schedule: LambdaLR = make_schedule(self.optimiser, steps=self.steps)
        self.step = 0
        self.best: float | None = None
        self.headline = headline(setup.task, setup.origin.dataset)

    def run(self, progress: Progress) -> None:
        """Train to the last step."""
        counts = ", ".join(f"{name} {count:,}" for name, count in self.model.parameter_counts().items())
        logger.info("training on %d samples, parameters: %s", len(self.setup.samples), counts)
        saved = begun = time.monotonic()
        first = self.step
        check_every, log_every = max(1, self.steps // CHECKS), max(1, self.steps // LOG_LINES)
        batches = make_loader(
            self.setup.samples,
            self.batch_size,
            seed=self.config.seed,
            drop_last=True,
            start=self.step,
            steps=self.steps - self.step,
        )
        for batch in batches:
            loss = self.learn(batch)
            speed = (self.step - first) * self.batch_size / (time.monotonic() - begun)
            if self.step % log_every == 0:
                append_metrics(
                    self.folder, {"step": self.step, "loss": loss, "samples_per_second": round(speed, 2)}
                )
            if self.step % check_every == 0 or self.step == self.steps:
                self.check()
                self.save()
                saved = time.monotonic()
            elif time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                self.save()
                saved = time.monotonic()
            progress(self.step, self.steps, f"loss {loss:.4f}, {speed:.3g} samples/s")

    def learn(self, batch: Batch) -> float:
        """One step; its loss. Raises TrainingError, naming the samples, if that is not finite."""
        task = self.setup.task
        outputs = forward_batch(self.model, batch, precision=self.config.precision)
        target = batch.targets[task.label].to(self.device, non_blocking=True)
        loss = task.loss(outputs, target, self.setup.label)
        value = loss.item()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became {value} at step {self.step + 1}, on samples {', '.join(batch.ids)}; "
                f"look at them with 'mmdiff-cache inspect {self.setup.store.path}', "
                f"or lower learning_rate ({self.config.learning_rate:g})"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        self.ema.update(self.model)
        self.step += 1
        return value

    def check(self) -> None:
        """Score the held-out samples with the averaged weights, at the end with the raw ones too; keep the
        best.
        """
        if self.setup.held_out is None:
            return
        models = {EMA: self.ema.model, **({RAW: self.model.eval()} if self.step == self.steps else {})}
        scores = score(
            {
                name: model_predictor(model, self.setup.task, self.config.precision)
                for name, model in models.items()
            },
            self.setup.held_out,
            self.setup.task,
            data_set=self.setup.origin.dataset,
            original=False,
            batch_size=self.batch_size,
        )
        self.model.train()
        value = scores[EMA].overall[self.headline]
        logger.info("step %d: held-out %s %s", self.step, self.headline, value)
        append_metrics(
            self.folder,
            {"step": self.step, "held_out": {name: result.overall for name, result in scores.items()}},
        )
        if value is not None and better(self.setup.task, value, self.best):
            self.best = value
            checkpoint.save(self.folder / BEST, self.header(), {EMA: self.ema.model.state_dict()})

    def header(self) -> Header:
        """What the checkpoints of this moment say about themselves."""
        return Header(
            step=self.step,
            config=self.config.to_json(),
            spec=spec_to_json(self.model.spec),
            store=self.setup.store_identity,
            best=self.best,
        )

    def save(self) -> None:
        """Write all that is needed to go on from here."""
        groups = {
            RAW: self.model.state_dict(),
            EMA: self.ema.model.state_dict(),
            OPTIMISER: checkpoint.pack_optimiser(self.optimiser),
            RNG: checkpoint.pack_random_state(),
        }
        checkpoint.save(self.folder / LAST, self.header(), groups)

    def go_on(self) -> None:
        """Take up the state of the last checkpoint. Raises CheckpointError if it was trained on other
        samples.
        """
        path = self.folder / LAST
        header = checkpoint.read_header(path)
        for name, value in self.setup.store_identity.items():
            if header.store.get(name) != value:
                raise CheckpointError(
                    f"{path} was trained on a store whose {name} is {header.store.get(name)}, that of "
                    f"{self.setup.store.path} is {value}; train anew with another --run"
                )
        checkpoint.load_weights(self.model, path, RAW)
        checkpoint.load_weights(self.ema.model, path, EMA)
        self.ema.updates = self.step = header.step
        self.best = header.best
        checkpoint.unpack_optimiser(self.optimiser, checkpoint.read_group(path, OPTIMISER))
        self.schedule.last_epoch = self.step
        for group, base, factor in zip(
            self.optimiser.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.step)
        cut_metrics(self.folder, self.step)
        checkpoint.unpack_random_state(checkpoint.read_group(path, RNG))
        logger.info("going on from step %d of %d", self.step, self.steps)
