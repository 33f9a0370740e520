"""From the device's memory to the CPU's, beside what the device computes next."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdiff_cache.extraction.profile import Profile

Arrays = dict[str, NDArray[Any]]


def start_copy(tensors: Mapping[str, Tensor], device: torch.device, profile: Profile) -> Callable[[], Arrays]:
    """Begin to copy; call what it returns, from any thread, to wait for the arrays.

    On a GPU the copies run on a stream of their own into pinned memory, without which they would hold up the
    GPU. Elsewhere they are done at once.
    """
    if device.type == "cuda":
        return _start_on_side_stream(tensors, device, profile)
    with profile.timing("copy to host"):
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    return lambda: arrays


def _start_on_side_stream(
    tensors: Mapping[str, Tensor], device: torch.device, profile: Profile
) -> Callable[[], Arrays]:
    stream, done = torch.cuda.Stream(device), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(device))  # the values must have been computed
    hosts: dict[str, Tensor] = {}
    with torch.cuda.stream(stream), profile.timing("copy to host", device):
        for name, tensor in tensors.items():
            hosts[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            hosts[name].copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # its memory is not given away before it is copied
        done.record(stream)

    def wait() -> Arrays:
        done.synchronize()
        return {name: host.numpy() for name, host in hosts.items()}

    return wait
