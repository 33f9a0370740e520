"""What makes a training faster or smaller never changes what it computes."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mmdiff_cache.models import temporal
from mmdiff_cache.models.aggregator import to_map
from mmdiff_cache.models.mmdiff import AGGREGATORS, MMDiff
from mmdiff_cache.models.temporal import TemporalAttention
from tests.models.compiled import C, L, T, build, learn


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", list(AGGREGATORS))
def test_checkpointing_changes_no_bit(kind: str, autocast: bool) -> None:
    plain, frugal = learn(build(kind), autocast), learn(build(kind, checkpointing=True), autocast)
    assert all(torch.equal(one, other) for one, other in zip(plain, frugal, strict=True))


def test_checkpointing_keeps_less() -> None:
    def kept(model: MMDiff) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        held = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = model(torch.randn(2, T, L, 4, 6, C))
        assert output.requires_grad
        return sum(size for address, size in sizes.items() if address not in held)

    assert kept(build(checkpointing=True)) < 0.3 * kept(build())


def in_a_plain_process(check: str) -> None:
    """Run a check of `compiled` where nothing wraps our functions: the compiler cannot look through that."""
    script = f"from tests.models.compiled import {check}; {check}()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def test_compiled_blocks_share_a_graph_and_change_nothing() -> None:
    in_a_plain_process("blocks_share_a_graph_and_change_nothing")


@pytest.mark.slow
def test_inductor_changes_results_by_rounding_alone() -> None:
    in_a_plain_process("inductor_changes_results_by_rounding_alone")


def test_a_failing_compiler_is_one_line_with_the_way_out() -> None:
    in_a_plain_process("a_failing_compiler_is_one_line_with_the_way_out")


@pytest.mark.parametrize("most", [1000, 4], ids=["whole", "in parts"])
def test_both_ways_to_attend_agree(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for accelerators and the sums for processors, values and gradients."""
    monkeypatch.setattr(temporal, "MOST_SEQUENCES", most)
    torch.manual_seed(0)
    attention = TemporalAttention(8, 2)
    x = torch.randn(T, 10, 8, requires_grad=True)
    inputs = (x, attention.qkv.weight, attention.qkv.bias)
    ways = [attention._pairwise(x), attention._in_one_kernel(x)]  # pyright: ignore[reportPrivateUsage]
    torch.testing.assert_close(*ways, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(ways[0])
    gradients = [torch.autograd.grad(way, inputs, grad) for way in ways]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_gradients_enter_an_aggregator_token_by_token() -> None:
    """A decoder's come channel by channel; what is computed with them keeps their layout."""
    features, tokens = torch.zeros(2, 1, 4, 5, 3), torch.randn(40, 8, requires_grad=True)
    arrived: list[Tensor] = []
    tokens.register_hook(arrived.append)
    grad = torch.randn(2, 8, 4, 5)
    to_map(tokens, features).backward(grad)
    assert arrived[0].is_contiguous()
    assert torch.equal(arrived[0], grad.permute(0, 2, 3, 1).reshape(40, 8))


def test_a_single_timestep_needs_no_attention() -> None:
    """Its value alone, as the attention over one token would give."""
    torch.manual_seed(0)
    attention, x = TemporalAttention(8, 2), torch.randn(1, 10, 8, requires_grad=True)
    inputs = (x, attention.qkv.weight, attention.qkv.bias)
    ways = [attention._pairwise(x), attention._of_itself(x)]  # pyright: ignore[reportPrivateUsage]
    torch.testing.assert_close(*ways, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(ways[0])
    gradients = [torch.autograd.grad(way, inputs, grad) for way in ways]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
