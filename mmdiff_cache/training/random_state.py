"""torch's random numbers as one training has them, whatever else runs in the process."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def own_random_state() -> AbstractContextManager[None]:
    """Leave torch's generators as they were: a caller's random numbers do not depend on ours."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


class RandomState:
    """The generators of one training: `with state:` puts them in place, and the caller's back afterwards."""

    def __init__(self, seed: int) -> None:
        with own_random_state():
            torch.manual_seed(seed)
            self._held = _generators()
        self._callers: Mapping[str, Tensor] = {}

    def __enter__(self) -> None:
        self._callers = _generators()
        _set_generators(self._held)

    def __exit__(self, *exception: object) -> None:
        self._held = _generators()
        _set_generators(self._callers)

    def pack(self) -> Mapping[str, Tensor]:
        """The state as tensors, for a checkpoint; not to be called inside of `with`."""
        return self._held

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `pack` gave; a machine with other devices keeps its own for those."""
        self._held = {**self._held, **{name: tensors[name] for name in self._held if name in tensors}}


def _generators() -> dict[str, Tensor]:
    """The states of torch's generators: the CPU's, and each CUDA device's where there are any."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), **{f"cuda{n}": state for n, state in enumerate(devices)}}


def _set_generators(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for number in range(torch.cuda.device_count()):
        torch.cuda.set_rng_state(states[f"cuda{number}"], number)
