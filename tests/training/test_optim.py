"""Which parameters learn at which rate, and how the rate moves."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from mmdiff_cache.config import AggregatorConfig
from mmdiff_cache.models.mmdiff import MMDiff, ModelSpec
from mmdiff_cache.training.optim import LONGEST_WARMUP, make_optimizer, make_schedule, rate_factor

RATE, SHARE, DECAY = 1e-3, 0.5, 0.02


def build() -> MMDiff:
    return MMDiff.from_spec(
        ModelSpec(
            decoder="deeplabv3plus",
            out_channels=2,
            layers=2,
            channels=12,
            timesteps=2,
            cleanest=1,
            grid=(4, 4),
            patch=8,
            aggregator=AggregatorConfig(width=8, heads=2, depth=1),
        )
    )


def settings_by_name(model: nn.Module) -> dict[str, tuple[float, float]]:
    """(rate, decay) of each parameter; fails if one is in no group or in two."""
    optimiser = make_optimizer(model, learning_rate=RATE, decoder_rate=SHARE, weight_decay=DECAY)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        (names[id(p)], (group["lr"], group["weight_decay"]))
        for group in optimiser.param_groups
        for p in group["params"]
    ]
    assert len(found) == len({name for name, _ in found}) == len(names)
    return dict(found)


def test_decoder_and_head_learn_at_half_the_rate() -> None:
    for name, (rate, _) in settings_by_name(build()).items():
        assert rate == pytest.approx(RATE * SHARE if name.startswith("decoder.") else RATE), name
    assert {"aggregators.0.cbam.spatial.conv.weight", "decoder.head.weight"} <= set(settings_by_name(build()))


def test_only_matrices_and_kernels_decay() -> None:
    model = build()
    decays = {name: decay for name, (_, decay) in settings_by_name(model).items()}
    for name, parameter in model.named_parameters():
        kept = parameter.ndim < 2 or name.endswith(".bias") or "norm" in name or "scale" in name
        kept = kept or name.endswith(("gate", "positions"))
        assert decays[name] == (0.0 if kept else DECAY), name
    assert decays["aggregators.0.transformer.blocks.0.attention.qkv.weight"] == DECAY
    assert decays["aggregators.0.gate"] == 0.0


def test_a_model_without_a_decoder_learns_at_the_base_rate() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    assert {rate for rate, _ in settings_by_name(model).values()} == {RATE}


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    model.bias.requires_grad_()
    optimiser = make_optimizer(model, learning_rate=RATE, decoder_rate=SHARE, weight_decay=DECAY)
    assert [len(group["params"]) for group in optimiser.param_groups] == [1]


@pytest.mark.parametrize("steps", [1, 2, 10, 200, 40_000])
def test_schedule_rises_then_falls_to_zero(steps: int) -> None:
    factors = [rate_factor(step, steps=steps) for step in range(steps + 1)]
    warmup = min(math.ceil(0.05 * steps), LONGEST_WARMUP)
    assert all(0 < factor <= 1 for factor in factors[:steps])
    assert factors[steps] == pytest.approx(0.0, abs=1e-12) or warmup == steps
    assert all(a < b for a, b in pairwise(factors[:warmup]))
    assert all(a >= b for a, b in pairwise(factors[warmup:]))
    if steps > 1:
        assert factors[warmup] == 1.0


def test_schedule_keeps_the_ratio_of_the_groups_and_resumes() -> None:
    model = build()
    optimiser = make_optimizer(model, learning_rate=RATE, decoder_rate=SHARE, weight_decay=DECAY)
    schedule = make_schedule(optimiser, steps=20)
    for step in range(7):
        rates = {group["lr"] for group in optimiser.param_groups}
        assert max(rates) == pytest.approx(RATE * rate_factor(step, steps=20))
        assert min(rates) == pytest.approx(max(rates) * SHARE)
        optimiser.step()
        schedule.step()
    saved = schedule.state_dict(), optimiser.state_dict()
    again = make_optimizer(build(), learning_rate=RATE, decoder_rate=SHARE, weight_decay=DECAY)
    resumed = make_schedule(again, steps=20)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    optimiser.step()
    schedule.step()
    again.step()
    resumed.step()
    assert resumed.get_last_lr() == schedule.get_last_lr()


def test_one_step_moves_every_parameter() -> None:
    torch.manual_seed(0)
    model = build().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = make_optimizer(model, learning_rate=RATE, decoder_rate=SHARE, weight_decay=DECAY)
    for _ in range(2):
        optimiser.zero_grad()
        (model(torch.randn(2, 2, 2, 4, 4, 12)) - 1).square().mean().backward()
        optimiser.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert [name for name in still if not name.endswith("weight_head.bias")] == []
