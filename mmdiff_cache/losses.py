"""The training losses. Each computes in float32 and leaves out what the labels mark as unknown.

A batch without a single known pixel gives 0 with a zero gradient, so that training goes on.
The paper names no losses; these are the usual ones of its decoders (docs/paper-notes.md).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

IGNORE = 255
"""The id that no loss counts, for class maps and for masks."""
SCALE_INVARIANCE = 0.5
"""lambda of the scale-invariant log loss: 0 is the plain log error, 1 forgives a wrong common factor."""
SMALLEST_DEPTH = 1e-6
"""Metres; predictions are not taken below it, so that their logarithm stays finite."""
ROOT_FLOOR = 1e-8
"""Under the square root, where the gradient of an exact fit would be infinite."""
IOU_SMOOTHING = 1.0
"""Pixels added to intersection and union, so that an empty mask has an IoU."""


def cross_entropy(
    logits: Float[Tensor, "B out H W"], target: Int[Tensor, "B H W"], ignore: int = IGNORE
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the pixels whose class is known."""
    total = functional.cross_entropy(logits.float(), target.long(), ignore_index=ignore, reduction="sum")
    return total / (target != ignore).sum().clamp(min=1)


def scale_invariant_log(
    depth: Float[Tensor, "B 1 H W"], target: Float[Tensor, "B H W"], valid_range: tuple[float, float]
) -> Float[Tensor, ""]:
    """sqrt(mean(g^2) - lambda * mean(g)^2) for each picture, then the mean; g = log(depth) - log(target).

    Both in metres; only pixels with a target inside the valid range count, and only pictures that have any.
    Eigen et al., 2014, Eq. 4, with the square root that later metric-depth work takes.
    """
    low, high = valid_range
    valid = (target > low) & (target < high)
    log_depth = depth.float().squeeze(1).clamp(min=SMALLEST_DEPTH).log()
    log_target = torch.where(valid, target.float(), 1.0).log()
    gap = torch.where(valid, log_depth - log_target, 0.0)
    count = valid.sum(dim=(1, 2)).clamp(min=1)
    mean, mean_square = gap.sum(dim=(1, 2)) / count, gap.square().sum(dim=(1, 2)) / count
    errors = (mean_square - SCALE_INVARIANCE * mean.square() + ROOT_FLOOR).sqrt()
    return _mean_of(errors, valid.any(dim=2).any(dim=1))


def bce_soft_iou(
    logits: Float[Tensor, "B 1 H W"], mask: Int[Tensor, "B H W"], ignore: int = IGNORE
) -> Float[Tensor, ""]:
    """Binary cross-entropy over known pixels, plus the mean over pictures of 1 - soft IoU.

    The mask is 0, 1 or `ignore`.
    """
    scores = logits.float().squeeze(1)
    known = mask != ignore
    truth = torch.where(known, mask, 0).float()
    cross = functional.binary_cross_entropy_with_logits(scores, truth, reduction="none")
    cross = torch.where(known, cross, 0.0).sum() / known.sum().clamp(min=1)
    shown = torch.where(known, scores.sigmoid(), 0.0)
    overlap = (shown * truth).sum(dim=(1, 2))
    union = (shown + truth).sum(dim=(1, 2)) - overlap
    gaps = 1.0 - (overlap + IOU_SMOOTHING) / (union + IOU_SMOOTHING)
    return cross + _mean_of(gaps, known.any(dim=2).any(dim=1))


def _mean_of(values: Float[Tensor, " B"], counted: Bool[Tensor, " B"]) -> Float[Tensor, ""]:
    """The mean over the pictures that count; 0, still attached to the graph, if none does."""
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)
