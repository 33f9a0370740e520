"""The optimiser and its schedule: AdamW with half the rate for the decoder (Paper: Sec. 3.4).

The paper gives no schedule and no weight decay; the warm-up and cosine are ours (docs/paper-notes.md).
"""

import math
from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from mmdiff_cache.models.mmdiff import MMDiff

WARMUP_SHARE = 0.05
"""Of all steps, at most LONGEST_WARMUP, the rate rises from near zero."""
LONGEST_WARMUP = 500


def make_optimizer(model: MMDiff, *, learning_rate: float, decoder_rate: float, weight_decay: float) -> AdamW:
    """AdamW in four groups: aggregators and decoder (with its head), each with and without weight decay.

    The decoder's rate is `decoder_rate` times the base rate. Matrices and kernels decay; biases, norms,
    scales, gates and position embeddings do not.
    """
    groups = [
        {"params": parameters, "lr": learning_rate * rate, "weight_decay": decay}
        for part, rate in ((model.aggregators, 1.0), (model.decoder, decoder_rate))
        for decay, parameters in (
            (weight_decay, list(_parameters(part, decayed=True))),
            (0.0, list(_parameters(part, decayed=False))),
        )
        if parameters
    ]
    return AdamW(groups, lr=learning_rate)


def _parameters(part: nn.Module, *, decayed: bool) -> Iterator[nn.Parameter]:
    for name, parameter in part.named_parameters():
        is_weight = parameter.ndim >= 2 and not name.endswith("positions")
        if is_weight == decayed:
            yield parameter


def make_schedule(optimizer: AdamW, *, steps: int) -> LambdaLR:
    """The schedule of all groups; call `step()` once after each optimiser step."""
    return LambdaLR(optimizer, partial(rate_factor, steps=steps))


def rate_factor(step: int, *, steps: int) -> float:
    """Share of the base rate at step 0..steps-1: a linear rise, then a half cosine to zero after the last."""
    warmup = min(math.ceil(WARMUP_SHARE * steps), LONGEST_WARMUP)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))
