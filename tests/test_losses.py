"""Losses against values worked out by hand, and what they must leave out."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdiff_cache.losses import IGNORE, bce_soft_iou, cross_entropy, scale_invariant_log

RANGE = (0.1, 10.0)


def test_cross_entropy_by_hand() -> None:
    """Two known pixels with p = 3/4 and 1/3 of the right class, and one void that does not count."""
    logits = torch.tensor([[[[math.log(3.0), 0.0, 9.0]], [[0.0, math.log(0.5), -9.0]]]])
    target = torch.tensor([[[0, 1, IGNORE]]])
    expected = (-math.log(3 / 4) - math.log(1 / 3)) / 2
    assert cross_entropy(logits, target).item() == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_takes_another_void_or_none() -> None:
    logits, target = torch.randn(1, 3, 2, 2), torch.tensor([[[0, 1], [2, 2]]])
    plain = cross_entropy(logits, target)
    assert cross_entropy(logits, target, ignore=-1).item() == pytest.approx(plain.item())
    without_twos = cross_entropy(logits, target, ignore=2)
    assert without_twos.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits[:, :, :1], target[:, :1]).item()
    )


def test_scale_invariant_log_by_hand() -> None:
    """Gaps log 2 and 0: mean square (log 2)^2 / 2, squared mean (log 2)^2 / 4, lambda 1/2."""
    target = torch.tensor([[[2.0, 3.0, 0.0]]])  # the last one is outside the valid range
    depth = torch.tensor([[[[4.0, 3.0, 7.0]]]])
    expected = math.log(2.0) * math.sqrt(1 / 2 - 1 / 8)
    assert scale_invariant_log(depth, target, RANGE).item() == pytest.approx(expected, rel=1e-4)


def test_scale_invariant_log_is_taken_by_picture() -> None:
    """One picture twice as deep as it should be, one half: the factors of the two do not cancel."""
    target = torch.full((2, 4, 4), 2.0)
    depth = torch.stack([torch.full((1, 4, 4), 4.0), torch.full((1, 4, 4), 1.0)])
    expected = math.log(2.0) * math.sqrt(1 - 0.5)
    assert scale_invariant_log(depth, target, RANGE).item() == pytest.approx(expected, rel=1e-4)


def test_scale_invariant_log_forgives_half_of_a_common_factor() -> None:
    target = torch.rand(1, 8, 8) * 3 + 1
    depth = target[:, None] * torch.rand(1, 1, 8, 8).add(0.5)
    gap = (depth[:, 0].log() - target.log()).numpy()
    expected = math.sqrt(float(np.mean(gap**2) - 0.5 * np.mean(gap) ** 2))
    assert scale_invariant_log(depth, target, RANGE).item() == pytest.approx(expected, rel=1e-4)


def test_a_picture_without_valid_depth_does_not_dilute_the_others() -> None:
    target = torch.stack([torch.full((4, 4), 2.0), torch.full((4, 4), math.nan)])
    depth = torch.full((2, 1, 4, 4), 5.0)
    both, alone = scale_invariant_log(depth, target, RANGE), scale_invariant_log(depth[:1], target[:1], RANGE)
    assert both.item() == pytest.approx(alone.item())


def test_bce_soft_iou_by_hand() -> None:
    """Probabilities 3/4 on the object, 1/4 off it, one void pixel with a wild score."""
    score = math.log(3.0)
    logits = torch.tensor([[[[score, -score, 50.0]]]])
    mask = torch.tensor([[[1, 0, IGNORE]]])
    cross = -math.log(3 / 4)
    iou = (3 / 4 + 1) / (3 / 4 + 1 / 4 + 1 - 3 / 4 + 1)
    assert bce_soft_iou(logits, mask).item() == pytest.approx(cross + 1 - iou, rel=1e-6)


def test_bce_soft_iou_vanishes_on_a_perfect_answer() -> None:
    mask = torch.randint(0, 2, (2, 6, 6))
    logits = (mask[:, None].float() * 2 - 1) * 40
    assert bce_soft_iou(logits, mask).item() == pytest.approx(0.0, abs=1e-6)
    assert bce_soft_iou(-logits, mask).item() > 10


def nothing_known() -> list[tuple[Tensor, Tensor]]:
    """A loss over inputs of which no pixel is known, and those inputs."""
    cases: list[tuple[Tensor, Tensor]] = []
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    cases.append((cross_entropy(logits, torch.full((2, 4, 4), IGNORE)), logits))
    depth = torch.rand(2, 1, 4, 4).requires_grad_()
    cases.append((scale_invariant_log(depth, torch.zeros(2, 4, 4), RANGE), depth))
    scores = torch.randn(2, 1, 4, 4, requires_grad=True)
    cases.append((bce_soft_iou(scores, torch.full((2, 4, 4), IGNORE)), scores))
    return cases


def test_nothing_known_gives_zero_and_a_zero_gradient() -> None:
    for loss, inputs in nothing_known():
        assert loss.item() == 0.0
        loss.backward()
        assert inputs.grad is not None
        assert (inputs.grad == 0).all()


def test_unknown_pixels_have_no_gradient_and_no_say() -> None:
    torch.manual_seed(0)
    mask = torch.randint(0, 2, (2, 4, 4))
    mask[:, 0] = IGNORE
    depth = torch.where(mask == IGNORE, math.nan, 2.0)
    for make in (
        lambda x: cross_entropy(x, mask),
        lambda x: scale_invariant_log(x[:, :1].exp(), depth, RANGE),
        lambda x: bce_soft_iou(x[:, :1], mask),
    ):
        inputs = torch.randn(2, 2, 4, 4, requires_grad=True)
        loss = make(inputs)
        loss.backward()
        assert inputs.grad is not None
        assert (inputs.grad[:, :, 0] == 0).all()
        assert inputs.grad[:, 0, 1:].abs().min() > 0
        with torch.no_grad():
            changed = inputs.clone()
            changed[:, :, 0] = 7.0
            assert make(changed).item() == pytest.approx(loss.item())


def test_gradient_of_an_exact_fit_is_finite() -> None:
    target = torch.rand(1, 4, 4) + 1
    depth = target[:, None].clone().requires_grad_()
    scale_invariant_log(depth, target, RANGE).backward()
    assert depth.grad is not None
    assert depth.grad.isfinite().all()


def test_half_precision_outputs_are_taken_in_float32() -> None:
    logits = (torch.randn(2, 3, 8, 8) * 20).bfloat16()
    target = torch.randint(0, 3, (2, 8, 8))
    assert cross_entropy(logits, target).dtype == torch.float32
    assert bce_soft_iou(logits[:, :1], target % 2).dtype == torch.float32
    assert scale_invariant_log(logits[:, :1].exp(), target + 1.0, RANGE).dtype == torch.float32
