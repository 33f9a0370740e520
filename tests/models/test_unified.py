"""A unified model serves each task as a model of its own would, with weights that all tasks share."""

import dataclasses

import pytest
import torch

from mmdiff_cache.config import AggregatorConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.models.mmdiff import MMDiff, ModelSpec
from mmdiff_cache.models.unified import Head, Unified, UnifiedSpec

CLASSES = ModelSpec(
    decoder="dpt",
    out_channels=5,
    layers=2,
    channels=24,
    timesteps=3,
    cleanest=2,
    grid=(4, 4),
    patch=8,
    concepts=3,
    aggregator=AggregatorConfig(width=16, depth=1, heads=2),
)
DEPTH = dataclasses.replace(CLASSES, out_channels=1, output="depth", typical_depth=3.5)
SIZE = (32, 32)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 2, 4, 4, 24), torch.rand(2, 3, 4, 4)


@pytest.fixture
def model() -> Unified:
    torch.manual_seed(0)
    return Unified(UnifiedSpec.join({"segmentation": CLASSES, "depth": DEPTH})).eval()


def test_each_task_gets_its_own_channels_of_one_head(model: Unified) -> None:
    hidden_states, concepts = inputs()
    everything = model.trunk(hidden_states, concepts, size=SIZE)
    classes = model.for_task("segmentation")(hidden_states, concepts, size=SIZE)
    depth = model.for_task("depth")(hidden_states, concepts, size=SIZE)
    assert torch.equal(classes, everything[:, :5])
    assert torch.equal(depth, everything[:, 5:].exp())


def test_a_task_is_served_as_by_a_model_of_its_own_with_these_weights(model: Unified) -> None:
    hidden_states, concepts = inputs()
    for spec, rows, task in ((CLASSES, slice(0, 5), "segmentation"), (DEPTH, slice(5, 6), "depth")):
        alone = MMDiff.from_spec(spec).eval()
        weights = dict(model.trunk.state_dict())
        for name in ("decoder.head.weight", "decoder.head.bias"):
            weights[name] = weights[name][rows]
        alone.load_state_dict(weights)
        found = model.for_task(task)(hidden_states, concepts, size=SIZE)
        torch.testing.assert_close(found, alone(hidden_states, concepts, size=SIZE))


def test_untrained_depth_is_the_typical_depth(model: Unified) -> None:
    head = model.trunk.decoder.head
    with torch.no_grad():
        head.weight.zero_()
    depth = model.for_task("depth")(*inputs(), size=SIZE)
    torch.testing.assert_close(depth, torch.full((2, 1, *SIZE), 3.5))
    assert not torch.equal(head.bias[:5], torch.full((5,), torch.tensor(3.5).log().item()))


def test_one_tasks_loss_moves_what_is_shared_and_no_others_head(model: Unified) -> None:
    model.train().for_task("depth")(*inputs(), size=SIZE).mean().backward()
    gradient = model.trunk.decoder.head.weight.grad
    assert gradient is not None
    assert (gradient[:5] == 0).all()
    assert (gradient[5:] != 0).any()
    shared = model.trunk.aggregators.get_parameter("0.weight_head.weight").grad
    assert shared is not None
    assert (shared != 0).any()


def test_the_spec_goes_to_json_and_back(model: Unified) -> None:
    assert UnifiedSpec.from_json(model.spec.to_json()) == model.spec
    assert model.spec.heads == (
        Head(task="segmentation", channels=5),
        Head(task="depth", channels=1, output="depth", typical_depth=3.5),
    )


def test_what_differs_between_stores_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"segmentation and depth needs the same grid.*\(4, 4\) and \(8, 8\)"
    ):
        UnifiedSpec.join({"segmentation": CLASSES, "depth": dataclasses.replace(DEPTH, grid=(8, 8))})


def test_a_task_that_it_was_not_trained_for_is_refused(model: Unified) -> None:
    with pytest.raises(ConfigError, match="trained for segmentation, depth, not for 'saliency'"):
        model.for_task("saliency")
