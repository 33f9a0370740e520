"""What arrives on the CPU is what the device held when the copy began."""

import pytest
import torch

from mmdiff_cache.extraction.host_copy import start_copy
from mmdiff_cache.extraction.profile import Profile


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_arrays_are_the_tensors(name: str) -> None:
    device = torch.device(name)
    tensors = {
        "half": torch.randn(3, 5).to(torch.float16),
        "turned": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        "empty": torch.empty(0, 2),
    }
    arrays = start_copy({part: t.to(device) for part, t in tensors.items()}, device, Profile())()
    assert arrays.keys() == tensors.keys()
    for part, tensor in tensors.items():
        assert torch.equal(torch.from_numpy(arrays[part]), tensor)


@pytest.mark.gpu
def test_on_a_gpu_they_are_the_values_of_that_moment() -> None:
    """The memory of what is copied is asked for again at once; the copy must have kept it from being lent."""
    device = torch.device("cuda")
    for number in range(20):
        value = torch.full((4096, 4096), float(number), device=device)
        wait = start_copy({"value": value}, device, Profile())
        del value
        torch.full((4096, 4096), -1.0, device=device)
        assert bool((wait()["value"] == number).all())
