"""Memory is used again, and never while anybody can still see it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmdiff_cache.slots import BatchSlots

SAMPLE = (2, 3, 4, 4, 8)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA torch's own cache does this")


def test_what_nobody_holds_is_lent_again() -> None:
    slots = BatchSlots(SAMPLE, batch_size=4, kept=3)
    first = slots.take(4)
    place = address(first)
    assert (first.shape, first.dtype) == ((4, *SAMPLE), torch.float16)
    del first
    short = slots.take(1)
    assert address(short) == place
    assert short.shape == (1, *SAMPLE)


@pytest.mark.parametrize(
    "keep",
    [
        lambda batch: batch,
        lambda batch: batch[1:, :, 0],
        lambda batch: batch.numpy(),
        lambda batch: batch.numpy()[1][0][1:],
        lambda batch: batch.numpy().reshape(-1)[3:].T,
        lambda batch: torch.from_numpy(batch.numpy()[0]).view(-1),
        lambda batch: batch.detach().requires_grad_().pow(2),
        lambda batch: memoryview(batch.numpy()),
    ],
    ids=["it", "a view", "an array", "a view of it", "reshaped", "there and back", "autograd", "a buffer"],
)
def test_a_batch_that_is_held_in_any_way_is_not_overwritten(keep: Callable[[Tensor], object]) -> None:
    slots = BatchSlots(SAMPLE, batch_size=2, kept=3)
    batch = slots.take(2).fill_(1)
    place, held = address(batch), keep(batch)
    del batch
    others = [slots.take(2).fill_(2) for _ in range(3)]
    assert place not in {address(other) for other in others}
    del held, others
    assert place in {address(other) for other in [slots.take(2) for _ in range(3)]}


def test_no_more_memory_waits_than_was_said() -> None:
    slots = BatchSlots(SAMPLE, batch_size=1, kept=2)
    many = [slots.take(1) for _ in range(5)]
    assert len({address(one) for one in many}) == 5
    many.clear()
    assert len(slots._free) == 2


def test_a_batch_outlives_its_slots() -> None:
    slots = BatchSlots(SAMPLE, batch_size=1, kept=1)
    batch = slots.take(1).fill_(5)
    del slots
    assert bool((batch == 5).all())
