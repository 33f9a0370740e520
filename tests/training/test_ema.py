"""The moving average against its recurrence, on numbers small enough to follow."""

import copy

import pytest
import torch
from torch import nn

from mmdiff_cache.config import EmaConfig
from mmdiff_cache.training.ema import Ema


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def wander(model: nn.Module, seed: int) -> None:
    """Set every parameter and float buffer to something new."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize(("beta", "warmup"), [(0.999, True), (0.5, True), (0.9, False)])
def test_follows_its_recurrence(beta: float, warmup: bool) -> None:
    model = build()
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    ema = Ema(model, EmaConfig(beta=beta, warmup=warmup))
    for n in range(12):
        wander(model, n)
        ema.update(model)
        share = min(beta, (1 + n) / (10 + n)) if warmup else beta
        for name, parameter in model.named_parameters():
            expected[name] = share * expected[name] + (1 - share) * parameter.detach().double()
    for name, parameter in ema.model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_constant_beta_has_its_closed_form() -> None:
    """Weights at 1 from a start at 0: after n updates the average is 1 - beta^n."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, EmaConfig(beta=0.9, warmup=False))
    nn.init.ones_(model.weight)
    for _ in range(20):
        ema.update(model)
    assert ema.model.weight.item() == pytest.approx(1 - 0.9**20, rel=1e-5)


def test_warmup_forgets_the_start_and_ends_at_beta() -> None:
    ema = Ema(nn.Linear(1, 1), EmaConfig(beta=0.999))
    assert ema.decay() == pytest.approx(0.1)
    ema.updates = 10_000
    assert ema.decay() == 0.999


def test_buffers_are_copied() -> None:
    model = build()
    ema = Ema(model, EmaConfig())
    wander(model, 5)
    ema.update(model)
    for mine, theirs in zip(ema.model.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_average_is_a_model_of_its_own_ready_to_evaluate() -> None:
    model = build().train()
    ema = Ema(model, EmaConfig())
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ema.update(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_state_goes_round() -> None:
    """An average that is saved and loaded half-way ends where the uninterrupted one ends, bit for bit."""
    model = build()
    ema = Ema(model, EmaConfig())
    for n in range(5):
        wander(model, n)
        ema.update(model)
    saved = copy.deepcopy(ema.state_dict())
    again = Ema(build(), EmaConfig())
    again.load_state_dict(saved)
    for n in range(5, 9):
        wander(model, n)
        ema.update(model)
        again.update(model)
    assert again.updates == ema.updates == 9
    for mine, theirs in zip(again.model.parameters(), ema.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
