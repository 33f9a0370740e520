"""The loop of one training: its state, one step of it, its checks and its checkpoints."""

import logging
import time
from pathlib import Path

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from mmdiff_cache.config import filled
from mmdiff_cache.errors import CheckpointError, TrainingError
from mmdiff_cache.loader import Batch, make_loader
from mmdiff_cache.records import Progress
from mmdiff_cache.tasks import better, headline
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.build import Model, Setup, build_model, spec_to_json
from mmdiff_cache.training.checkpoint import BEST, EMA, LAST, OPTIMISER, RAW, RNG, Header
from mmdiff_cache.training.compilation import compile_errors, compile_model
from mmdiff_cache.training.ema import Ema
from mmdiff_cache.training.folder import append_metrics, cut_metrics
from mmdiff_cache.training.optim import make_optimizer, make_schedule
from mmdiff_cache.training.scoring import forward_batch, model_predictor, score

logger = logging.getLogger(__name__)

CHECKS = 10
"""Times in a training that the held-out samples are scored and a checkpoint is written."""
SECONDS_BETWEEN_CHECKPOINTS = 300.0
"""At least as often a checkpoint is written, so that a long training loses little."""
LOG_LINES = 200
"""Losses written to the metrics over a whole training."""


class Trainer:
    """The state of one training: weights, their average, the optimiser, the step."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self.folder, self.config = setup, folder, setup.config
        self.steps, self.batch_size = filled(self.config.steps), filled(self.config.batch_size)
        self.device = torch.device(self.config.device)
        self.model: Model = build_model(setup.spec).to(self.device).train()
        self.ema: Ema[Model] = Ema(self.model, self.config.ema)
        if self.config.compile:
            compile_model(self.model)
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

    @compile_errors()
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
        """Score the held-out samples with the averaged weights, at the end also the raw ones."""
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
        """Take up the last checkpoint. Raises CheckpointError if it was trained on other samples."""
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
