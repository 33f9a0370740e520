"""The training losses. Each computes in float32 and leaves out what the labels mark as unknown.

A batch without a single known pixel gives 0 with a zero gradient, so that training goes on.
The paper names no losses; these are the usual ones of its decoders (docs/paper-notes.md).

`whole` is for a batch that is computed in parts: the targets of all of it. Each sum, over pixels or over
pictures, is then divided by what `whole` has to count, so that the losses of the parts add up to that of the
batch, however unevenly unknown pixels lie among them.
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
    logits: Float[Tensor, "B out H W"],
    target: Int[Tensor, "B H W"],
    ignore: int = IGNORE,
    whole: Int[Tensor, "_ H W"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the pixels whose class is known."""
    total = functional.cross_entropy(logits.float(), target.long(), ignore_index=ignore, reduction="sum")
    counted = target if whole is None else whole
    return total / (counted != ignore).sum().clamp(min=1)


def scale_invariant_log(
    depth: Float[Tensor, "B 1 H W"],
    target: Float[Tensor, "B H W"],
    valid_range: tuple[float, float],
    whole: Float[Tensor, "_ H W"] | None = None,
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
    everything = valid if whole is None else (whole > low) & (whole < high)
    return _share_of_mean(errors, valid, everything)


def bce_soft_iou(
    logits: Float[Tensor, "B 1 H W"],
    mask: Int[Tensor, "B H W"],
    ignore: int = IGNORE,
    whole: Int[Tensor, "_ H W"] | None = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy over known pixels, plus the mean over pictures of 1 - soft IoU.

    The mask is 0, 1 or `ignore`.
    """
    scores = logits.float().squeeze(1)
    known = mask != ignore
    everything = known if whole is None else whole != ignore
    truth = torch.where(known, mask, 0).float()
    cross = functional.binary_cross_entropy_with_logits(scores, truth, reduction="none")
    cross = torch.where(known, cross, 0.0).sum() / everything.sum().clamp(min=1)
    shown = torch.where(known, scores.sigmoid(), 0.0)
    overlap = (shown * truth).sum(dim=(1, 2))
    union = (shown + truth).sum(dim=(1, 2)) - overlap
    gaps = 1.0 - (overlap + IOU_SMOOTHING) / (union + IOU_SMOOTHING)
    return cross + _share_of_mean(gaps, known, everything)


def _share_of_mean(
    values: Float[Tensor, " B"], known: Bool[Tensor, "B H W"], whole: Bool[Tensor, "_ H W"]
) -> Float[Tensor, ""]:
    """What these pictures add to the mean over those of `whole` with a known pixel.

    0, still attached to the graph, if none has one.
    """
    total = torch.where(known.any(dim=2).any(dim=1), values, 0.0).sum()
    return total / whole.any(dim=2).any(dim=1).sum().clamp(min=1)
