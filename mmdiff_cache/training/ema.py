"""The exponential moving average of the weights, kept as a second model that is always ready to evaluate."""

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mmdiff_cache.config import EmaConfig

ModelT = TypeVar("ModelT", bound=nn.Module)


class Ema(Generic[ModelT]):
    """shadow <- beta_n * shadow + (1 - beta_n) * weights after each optimiser step. Paper: Sec. 3.4.

    With warm-up beta_n = min(beta, (1 + n) / (10 + n)), where n counts the updates already made; so a short
    training is not averaged with its random start. `model` is the average, ready to evaluate, gradients off.
    """

    def __init__(self, model: ModelT, config: EmaConfig) -> None:
        self.config = config
        self.updates = 0
        self.model: ModelT = copy.deepcopy(model).requires_grad_(False).eval()

    def decay(self) -> float:
        """The beta of the next update."""
        warm = (1 + self.updates) / (10 + self.updates)
        return min(self.config.beta, warm) if self.config.warmup else self.config.beta

    @torch.no_grad()
    def update(self, model: ModelT) -> None:
        """Take one step towards the model's weights; buffers are copied."""
        average = get_ema_multi_avg_fn(self.decay())
        average(list(self.model.parameters()), list(model.parameters()), self.updates)
        for shadow, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            shadow.copy_(buffer)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates; `load_state_dict` takes it back."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, exactly."""
        self.model.load_state_dict(state["model"])
        self.updates = int(state["updates"])
