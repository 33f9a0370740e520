"""The optimiser and its schedule: AdamW with half the rate for the decoder (Paper: Sec. 3.4).

The paper gives no schedule and no weight decay; the warm-up and cosine are ours (docs/paper-notes.md).
"""

import math
from functools import partial

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

WARMUP_SHARE = 0.05
"""Of all steps, at most LONGEST_WARMUP, the rate rises from near zero."""
LONGEST_WARMUP = 500


def make_optimizer(
    model: nn.Module, *, learning_rate: float, decoder_rate: float, weight_decay: float
) -> AdamW:
    """AdamW over every parameter that takes a gradient, in up to four groups.

    What lies in the submodule `decoder` (its head included) learns at `decoder_rate` times the base rate.
    Matrices and kernels decay; biases, norms, scales, gates and position embeddings do not.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = learning_rate * (decoder_rate if "decoder" in name.split(".") else 1.0)
            decay = weight_decay if parameter.ndim >= 2 and not name.endswith("positions") else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return AdamW(
        [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()],
        fused=True,
    )


def make_schedule(optimizer: AdamW, *, steps: int) -> LambdaLR:
    """The schedule of all groups; call `step()` once after each optimiser step."""
    return LambdaLR(optimizer, partial(rate_factor, steps=steps))


def rate_factor(step: int, *, steps: int) -> float:
    """Share of the base rate at step 0..steps-1: a linear rise, then a half cosine to zero after the last."""
    warmup = min(math.ceil(WARMUP_SHARE * steps), LONGEST_WARMUP)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))
