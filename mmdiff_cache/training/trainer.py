"""One training: its state, one step of it, its checks and its checkpoints."""

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from mmdiff_cache.config import filled
from mmdiff_cache.errors import TrainingError
from mmdiff_cache.loader import Batch
from mmdiff_cache.tasks import better, headline
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.board import Board
from mmdiff_cache.training.build import (
    Network,
    Part,
    Setup,
    build_model,
    check_identity,
    fit_standardisation,
    for_task,
    spec_to_json,
)
from mmdiff_cache.training.checkpoint import BALANCE, BEST, EMA, LAST, OPTIMISER, RAW, RNG, Header
from mmdiff_cache.training.compilation import compile_errors, compile_model
from mmdiff_cache.training.ema import Ema
from mmdiff_cache.training.folder import append_metrics, cut_metrics
from mmdiff_cache.training.optim import make_optimizer, make_schedule, rate_factor
from mmdiff_cache.training.pictures import albums
from mmdiff_cache.training.random_state import RandomState
from mmdiff_cache.training.scoring import Predictor, Scores, model_predictor, seen_through
from mmdiff_cache.training.step import NotFinite, compute_gradient, limit_gradient, weigh_gradient
from mmdiff_cache.training.unified import Balance, judge, turns

logger = logging.getLogger(__name__)

Scored = dict[str, dict[str, Scores]]
"""Held-out scores by weights and task."""

SECONDS_BETWEEN_CHECKPOINTS = 300.0
"""At least as often a checkpoint is written, so that a long training loses little."""
LOG_LINES = 200
"""Losses written to the metrics over a whole training."""

Share = Callable[[Batch], Batch]
"""What a training reads of a batch that was read for several."""


def itself(batch: Batch) -> Batch:
    """The share of a training that has a reading to itself."""
    return batch


class Trainer:
    """The state of one training: weights, their average, the optimiser, the random numbers, the step.

    The loop hands it batches, of which it takes its share; `shares` has one for each part, see `loop`. A new
    one starts at step 0; `go_on` takes up the last checkpoint.
    """

    def __init__(self, setup: Setup, folder: Path, shares: Sequence[Share] = ()) -> None:
        self.setup, self.folder, self.config = setup, folder, setup.config
        self.shares = tuple(shares) or (itself,) * len(setup.parts)
        self.steps, self.batch_size = filled(self.config.steps), filled(self.config.batch_size)
        self.device = torch.device(self.config.device)
        self.random = RandomState(self.config.seed)
        with self.random:
            self.model: Network = build_model(setup.spec)
        if not (folder / LAST).exists():  # else the checkpoint has it
            fit_standardisation(self.model, [part.samples for part in setup.parts])
        self.model = self.model.to(self.device).train()
        self.ema: Ema[Network] = Ema(self.model, self.config.ema)
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
        self.taken = Counter[int]()
        """Steps made on each part."""
        self.best: float | None = None
        self.checks_since_best = 0
        self.headline = judge(setup.config, setup.parts[0].origin.dataset)
        self.balance = Balance(
            [part.task.name for part in setup.parts], self.config.balance_steps, self.config.loss_weights
        )
        self.state = ""
        """Loss and speed of the last step, in words."""
        self._albums = albums(setup, folder)
        self._board = Board(folder, after=0)
        self._first, self._begun = 0, time.monotonic()
        self._saved = self._begun

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the held-out score has been waited for long enough."""
        return self.step >= self.steps or has_waited(self.config.patience, self.checks_since_best)

    def begin(self) -> None:
        """Say what is trained."""
        counts = ", ".join(f"{name} {count:,}" for name, count in self.model.parameter_counts().items())
        samples = " + ".join(str(len(part.samples)) for part in self.setup.parts)
        logger.info("training on %s samples, parameters: %s", samples, counts)
        self._first, self._saved = self.step, time.monotonic()
        self._board = Board(self.folder, after=self.step)

    def end(self) -> None:
        """Close what is open."""
        self._board.close()

    def let_go(self) -> None:
        """Give back the memory of a training that failed; it goes on from its checkpoint, in another one."""
        del self.model, self.ema, self.optimiser, self.schedule
        gc.collect()  # an optimiser and its schedule hold each other

    def take(self, batch: Batch, part: int) -> None:
        """One step on a batch of a part, and its line in the metrics where one is due."""
        rate = self.config.learning_rate * rate_factor(self.step, steps=self.steps)
        if self.step == self._first:  # it may have waited for neighbours that were behind
            self._begun = time.monotonic()
        with self.random:
            values = self.learn(self.shares[part](batch), self.setup.parts[part])
        speed = (self.step - self._first) * self.batch_size / (time.monotonic() - self._begun)
        task = self.setup.parts[part].task.name if len(self.setup.parts) > 1 else None
        self.taken[part] += 1
        # Counted by task: where several come by turns, every n-th step might always be that of the same one.
        if self.taken[part] % max(1, self.steps // LOG_LINES) == 0:
            values |= {"learning_rate": rate}
            named = {} if task is None else {"task": task}
            line = {"step": self.step, **named, **values, "samples_per_second": round(speed, 2)}
            append_metrics(self.folder, line)
            self._board.add(self.step, {_curve("train", task, name): value for name, value in values.items()})
        self.state = f"{f'{task} ' if task else ''}loss {values['loss']:.4f}, {speed:.3g} samples/s"

    @compile_errors()
    def learn(self, batch: Batch, part: Part) -> dict[str, float]:
        """One step; its `loss`, `gradient_norm` before clipping, of several tasks also its `loss_weight`.

        Raises TrainingError, naming the samples, if either is not finite; nothing has changed then.
        """
        config, name = self.config, part.task.name
        values: dict[str, float] = {}
        try:
            values["loss"] = compute_gradient(
                for_task(self.model, name),
                batch,
                part.task,
                part.label,
                parts=config.accumulate,
                precision=config.precision,
            )
            if len(self.setup.parts) > 1:
                values["loss_weight"] = self.balance.weight(name, values["loss"])
                weigh_gradient(self.model, values["loss_weight"])
            values["gradient_norm"] = limit_gradient(self.model, config.clip, batch.ids)
        except NotFinite as error:
            raise self._not_finite(error, part) from error
        self.optimiser.step()
        self.schedule.step()
        self.ema.update(self.model)
        self.step += 1
        return values

    def _not_finite(self, error: NotFinite, part: Part) -> TrainingError:
        remedies = [f"lower learning_rate ({self.config.learning_rate:g})"]
        if self.config.precision != "float32":
            remedies.append(f"take precision float32 instead of {self.config.precision}")
        return TrainingError(
            f"the {error.what} became {error.value} at step {self.step + 1}, on samples "
            f"{', '.join(error.ids)}; look at them with 'mmdiff-cache inspect {part.store.path}', "
            f"or {', or '.join(remedies)}"
        )

    @property
    def check_is_due(self) -> bool:
        """Whether the held-out samples are to be scored after the step just made.

        The checks lie evenly over all steps, the last one at the end.
        """
        checks = self.config.checks
        return self.finished or self.step * checks // self.steps > (self.step - 1) * checks // self.steps

    def predictors(self, part: int) -> dict[str, Predictor]:
        """What is scored at a check of a part: the averaged weights and the raw ones."""
        precision, task = self.config.precision, self.setup.parts[part].task
        averaged, raw = (for_task(model.eval(), task.name) for model in (self.ema.model, self.model))
        seen = partial(seen_through, self.shares[part])
        return {
            EMA: seen(self._albums[part].watching(model_predictor(averaged, task, precision))),
            RAW: seen(model_predictor(raw, task, precision)),
        }

    def note_scores(self, scores: Scored) -> None:
        """Take down the held-out scores; keep the averaged weights if they are the best so far."""
        self.model.train()
        overall = {name: {task: one.overall for task, one in found.items()} for name, found in scores.items()}
        single = next(iter(overall[EMA])) if len(self.setup.parts) == 1 else None
        noted = overall if single is None else {name: found[single] for name, found in overall.items()}
        append_metrics(self.folder, {"step": self.step, "held_out": noted})
        self._board.add(self.step, _curves(scores))
        for part, album in zip(self.setup.parts, self._albums, strict=True):
            album.draw(self.step, scores[EMA][part.task.name])
        value = self._worth(overall[EMA])
        if value is not None and self._better(value):
            self.best, self.checks_since_best = value, 0
            checkpoint.save(self.folder / BEST, self.header(), {EMA: self.ema.model.state_dict()})
        else:
            self.checks_since_best += 1
        if self.step < self.steps and self.finished:
            logger.info(
                "stopped early at step %d: %s", self.step, waited_for(self.checks_since_best, self.headline)
            )

    def _worth(self, overall: Mapping[str, Mapping[str, Any]]) -> float | None:
        """What a check is judged by: the headline score; of several tasks the mean, with 1 - x for errors.

        None where a task has none.
        """
        values: list[float] = []
        for part in self.setup.parts:
            name = headline(part.task, part.origin.dataset)
            value = overall[part.task.name][name]
            logger.info("step %d: held-out %s %s", self.step, name, value)
            if value is None:
                return None
            values.append(value if len(self.setup.parts) == 1 or part.task.higher_is_better else 1 - value)
        return sum(values) / len(values)

    def _better(self, value: float) -> bool:
        task = self.setup.parts[0].task
        if len(self.setup.parts) > 1:
            task = replace(task, higher_is_better=True)
        return better(task, value, self.best)

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
            store=self.setup.identity,
            best=self.best,
            checks_since_best=self.checks_since_best,
        )

    def save(self) -> None:
        """Write all that is needed to go on from here."""
        groups = {
            RAW: self.model.state_dict(),
            EMA: self.ema.model.state_dict(),
            OPTIMISER: checkpoint.pack_optimiser(self.optimiser),
            RNG: self.random.pack(),
            **({BALANCE: self.balance.pack()} if len(self.setup.parts) > 1 else {}),
        }
        checkpoint.save(self.folder / LAST, self.header(), groups)

    def go_on(self) -> None:
        """Take up the last checkpoint. Raises CheckpointError if it was trained on other samples."""
        path = self.folder / LAST
        header = checkpoint.read_header(path)
        check_identity(self.setup, header.store, path)
        checkpoint.load_weights(self.model, path, RAW)
        checkpoint.load_weights(self.ema.model, path, EMA)
        self.ema.updates = self.step = header.step
        self.best, self.checks_since_best = header.best, header.checks_since_best
        checkpoint.unpack_optimiser(self.optimiser, checkpoint.read_group(path, OPTIMISER))
        self.schedule.last_epoch = self.step
        for group, base, factor in zip(
            self.optimiser.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.step)
        cut_metrics(self.folder, self.step)
        self.taken = Counter(turns(self.setup.ratio, 0, self.step))
        if len(self.setup.parts) > 1:
            self.balance.unpack(checkpoint.read_group(path, BALANCE))
        self.random.unpack(checkpoint.read_group(path, RNG))
        logger.info("going on from step %d of %d", self.step, self.steps)


def has_waited(patience: int | None, checks_since_best: int) -> bool:
    """Whether a training is to stop early."""
    return patience is not None and checks_since_best >= patience


def waited_for(checks: int, headline: str) -> str:
    """Why a training stopped early, in words."""
    return f"{checks} check{'s' * (checks > 1)} without a better held-out {headline}"


def _curve(group: str, task: str | None, name: str) -> str:
    """What a curve is called in TensorBoard; the task is named where there are several."""
    return f"{group}/{name}" if task is None else f"{group}/{task}/{name}"


def _curves(scores: Scored) -> dict[str, float]:
    """The numbers among the held-out scores, named for TensorBoard."""
    return {
        _curve(f"held_out_{weights}", task if len(found) > 1 else None, name): value
        for weights, found in scores.items()
        for task, result in found.items()
        for name, value in result.overall.items()
        if isinstance(value, float)
    }
