"""A training's random numbers depend on its seed alone, go on exactly, and leave the caller's alone."""

from pathlib import Path

import torch

from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.checkpoint import Header
from mmdiff_cache.training.random_state import RandomState

HEADER = Header(step=1, config={}, spec={}, store={})


def draw(state: RandomState) -> torch.Tensor:
    with state:
        return torch.rand(5)


def test_two_states_taken_by_turns_draw_what_each_draws_alone() -> None:
    alone = {seed: RandomState(seed) for seed in (0, 1)}
    expected = {seed: torch.cat([draw(state) for _ in range(3)]) for seed, state in alone.items()}
    turns = {seed: RandomState(seed) for seed in (0, 1)}
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for _ in range(3):
        for seed, state in turns.items():
            found[seed].append(draw(state))
            torch.rand(7)  # the caller's own
    for seed in turns:
        assert torch.equal(torch.cat(found[seed]), expected[seed])
    assert not torch.equal(expected[0], expected[1])


def test_the_callers_numbers_are_left_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = torch.rand(4)
        torch.manual_seed(5)
        draw(RandomState(0))
        assert torch.equal(torch.rand(4), expected)


def test_it_goes_on_exactly_from_a_checkpoint(tmp_path: Path) -> None:
    state = RandomState(3)
    draw(state)
    checkpoint.save(tmp_path / "x.safetensors", HEADER, {"rng": state.pack()})
    expected = draw(state)
    other = RandomState(99)
    other.unpack(checkpoint.read_group(tmp_path / "x.safetensors", "rng"))
    assert torch.equal(draw(other), expected)
