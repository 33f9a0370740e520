"""A step of a tiny model, and checks of the compiled one that run in a process of their own."""

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdiff_cache.config import AggregatorConfig
from mmdiff_cache.errors import TrainingError
from mmdiff_cache.models.mmdiff import MMDiff, ModelSpec
from mmdiff_cache.training.compilation import compile_errors

T, L, C, DEPTH = 3, 2, 12, 2
SPEC = ModelSpec(
    decoder="linear",
    out_channels=5,
    layers=L,
    channels=C,
    timesteps=T,
    cleanest=0,
    grid=(4, 6),
    patch=8,
    aggregator=AggregatorConfig(width=8, heads=2, depth=DEPTH, layer_scale=0.3),
)


def build(kind: str = "token", **changes: Any) -> MMDiff:
    """The same random weights each time."""
    torch.manual_seed(0)
    steps = 1 if kind == "none" else T
    aggregator = dataclasses.replace(SPEC.aggregator, kind=kind, **changes)
    return MMDiff.from_spec(dataclasses.replace(SPEC, timesteps=steps, aggregator=aggregator)).train()


def learn(model: MMDiff, autocast: bool = False) -> list[Tensor]:
    """Output and all gradients of one training step, dropout included."""
    torch.manual_seed(1)
    features = torch.randn(2, model.spec.timesteps, L, 4, 6, C).half()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        output = model(features)
    output.square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    return [output.detach(), *(torch.zeros(()) if grad is None else grad for grad in gradients)]


def blocks_share_a_graph_and_change_nothing() -> None:
    """Whatever the compiler does with the graph, the operations in it are ours, in our order.

    Random numbers of a processor are drawn between graphs, so that a block with dropout has several.
    """
    graphs: list[int] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    for dropout in (0.0, 0.1):
        plain, model = learn(build(dropout=dropout)), build(dropout=dropout)
        names = list(model.state_dict())
        assert model.compile_blocks(keep) == L * DEPTH
        compiled = learn(model)
        assert dropout > 0 or len(graphs) == 1, graphs
        assert list(model.state_dict()) == names
        assert all(torch.equal(one, other) for one, other in zip(plain, compiled, strict=True))


def inductor_changes_results_by_rounding_alone() -> None:
    """With and without checkpointing, dropout's random numbers included."""
    plain = learn(build())
    for checkpointing in (False, True):
        model = build(checkpointing=checkpointing)
        model.compile_blocks()
        for one, other in zip(plain, learn(model), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def a_failing_compiler_is_one_line_with_the_way_out() -> None:
    """It says how to do without."""

    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise RuntimeError("no C compiler")

    model = build()
    model.compile_blocks(broken)
    with (
        pytest.raises(TrainingError, match=r"no C compiler.*again with --set compile=false") as raised,
        compile_errors(),
    ):
        learn(model)
    assert "\n" not in str(raised.value)
