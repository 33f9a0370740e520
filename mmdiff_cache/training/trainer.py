"""One training: its state, one step of it, its checks and its checkpoints."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from mmdiff_cache.config import filled
from mmdiff_cache.errors import CheckpointError, TrainingError
from mmdiff_cache.loader import Batch
from mmdiff_cache.tasks import better, headline
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.build import Model, Setup, build_model, spec_to_json
from mmdiff_cache.training.checkpoint import BEST, EMA, LAST, OPTIMISER, RAW, RNG, Header
from mmdiff_cache.training.ema import Ema
from mmdiff_cache.training.folder import append_metrics, cut_metrics
from mmdiff_cache.training.optim import make_optimizer, make_schedule
from mmdiff_cache.training.random_state import RandomState
from mmdiff_cache.training.scoring import Predictor, Scores, forward_batch, model_predictor, seen_through

logger = logging.getLogger(__name__)

CHECKS = 10
"""Times in a training that the held-out samples are scored and a checkpoint is written."""
SECONDS_BETWEEN_CHECKPOINTS = 300.0
"""At least as often a checkpoint is written, so that a long training loses little."""
LOG_LINES = 200
"""Losses written to the metrics over a whole training."""

View = Callable[[Batch], Batch]
"""A training's own part of a batch that was read for several."""


def itself(batch: Batch) -> Batch:
    """The view of a training that has a reading to itself."""
    return batch


class Trainer:
    """The state of one training: weights, their average, the optimiser, the random numbers, the step.

    The loop hands it batches, of which it takes its `view`; see `loop`. A new one starts at step 0; `go_on`
    takes up the last checkpoint.
    """

    def __init__(self, setup: Setup, folder: Path, view: View = itself) -> None:
        self.setup, self.folder, self.config, self.view = setup, folder, setup.config, view
        self.steps, self.batch_size = filled(self.config.steps), filled(self.config.batch_size)
        self.device = torch.device(self.config.device)
        self.random = RandomState(self.config.seed)
        with self.random:
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
        self.state = ""
        """Loss and speed of the last step, in words."""
        self._first, self._begun = 0, time.monotonic()
        self._saved = self._begun

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps

    def begin(self) -> None:
        """Say what is trained, and start the clock."""
        counts = ", ".join(f"{name} {count:,}" for name, count in self.model.parameter_counts().items())
        logger.info("training on %d samples, parameters: %s", len(self.setup.samples), counts)
        self._first, self._begun = self.step, time.monotonic()
        self._saved = self._begun

    def take(self, batch: Batch) -> None:
        """One step on a batch, and its line in the metrics where one is due."""
        with self.random:
            loss = self.learn(self.view(batch))
        speed = (self.step - self._first) * self.batch_size / (time.monotonic() - self._begun)
        if self.step % max(1, self.steps // LOG_LINES) == 0:
            append_metrics(
                self.folder, {"step": self.step, "loss": loss, "samples_per_second": round(speed, 2)}
            )
        self.state = f"loss {loss:.4f}, {speed:.3g} samples/s"

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

    @property
    def check_is_due(self) -> bool:
        """Whether the held-out samples are to be scored after the step just made."""
        return self.step % max(1, self.steps // CHECKS) == 0 or self.finished

    def predictors(self) -> dict[str, Predictor]:
        """What is scored at a check: the averaged weights, at the end also the raw ones."""
        models = {EMA: self.ema.model, **({RAW: self.model} if self.finished else {})}
        return {
            name: seen_through(
                self.view, model_predictor(model.eval(), self.setup.task, self.config.precision)
            )
            for name, model in models.items()
        }

    def note_scores(self, scores: Mapping[str, Scores]) -> None:
        """Take down the held-out scores; keep the averaged weights if they are the best so far."""
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

    def save_if_due(self) -> None:
        """Write a checkpoint after each check, and where the last one is some minutes old."""
        if self.check_is_due or time.monotonic() - self._saved > SECONDS_BETWEEN_CHECKPOINTS:
            self.save()
            self._saved = time.monotonic()

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
            RNG: self.random.pack(),
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
        self.random.unpack(checkpoint.read_group(path, RNG))
        logger.info("going on from step %d of %d", self.step, self.steps)
