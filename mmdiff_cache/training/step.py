"""The gradient of one step: of a batch at once, or of its parts one after the other, which is the same."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mmdiff_cache.loader import Batch
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.tasks import Task, check_target
from mmdiff_cache.training.build import Model, Network
from mmdiff_cache.training.scoring import forward_batch, select


class NotFinite(Exception):
    """A loss or a gradient became infinite or no number: which of them, its value, and the samples."""

    def __init__(self, what: str, value: float, ids: Sequence[str]) -> None:
        super().__init__(what, value, ids)
        self.what, self.value, self.ids = what, value, tuple(ids)


def compute_gradient(
    model: Model, batch: Batch, task: Task, label: LabelSpec, *, parts: int = 1, precision: str = "float32"
) -> float:
    """Leave the gradient of a batch's loss in the model's parameters; returns the loss.

    In several parts memory is needed for one of them at a time. A part's loss is not a mean of its own: each
    of its sums is divided by the pixels, or pictures, that the whole batch has to count (`whole` in
    `losses`), so that losses and gradients of the parts add up to those of the batch, up to rounding, however
    unknown pixels lie among them. Dropout draws for each part.

    Raises DataError for an id that the label set does not have, NotFinite for a loss that is none.
    """
    check_target(batch.targets[task.label], label, batch.ids)
    model.zero_grad(set_to_none=True)
    whole = batch.targets[task.label].to(next(model.parameters()).device, non_blocking=True)
    beside = {} if parts == 1 else {"whole": whole}
    total = 0.0
    for rows in _cut(len(batch.ids), parts):
        part = select(batch, rows)
        outputs = forward_batch(model, part, precision=precision)
        loss = task.loss(outputs, whole[rows.start : rows.stop], label, **beside)
        value = loss.item()
        if not math.isfinite(value):
            raise NotFinite("loss", value, part.ids)
        loss.backward()
        total += value
    return total


def weigh_gradient(model: Network, weight: float) -> None:
    """Multiply a gradient: what a loss counts among others."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(weight)


def limit_gradient(model: Network, longest: float | None, ids: Sequence[str]) -> float:
    """Scale a gradient that is longer down to a norm of `longest`, over all parameters; its norm before.

    Raises NotFinite, with the ids of its samples, for one that has none: bfloat16 can overflow where the
    loss does not.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    value = norm.item()
    if not math.isfinite(value):
        raise NotFinite("gradient", value, ids)
    if longest is not None:
        clip_grads_with_norm_(parameters, longest, norm)
    return value


def _cut(count: int, parts: int) -> Iterator[range]:
    """The rows of each part, as even as they can be; fewer parts where there are fewer samples."""
    parts = min(parts, count)
    edges = [count * number // parts for number in range(parts + 1)]
    return (range(*pair) for pair in pairwise(edges))
