"""The other ways to fuse timesteps, against their equations written out token by token."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdiff_cache.config import AggregatorConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.models.aggregator import Aggregator, resolve_aggregator
from mmdiff_cache.models.mmdiff import AGGREGATORS, MMDiff, ModelSpec, resolve_model
from mmdiff_cache.models.simple_aggregators import ConcatAggregator, GlobalAggregator
from tests.models.equations import dense, layer_norm, project, softmax

B, T, H, W, C, D = 2, 3, 4, 5, 12, 8
KINDS = ("mean", "concat", "global", "none")
NORMS = ("before_projection", "after_projection", "none")
SPEC = ModelSpec(
    decoder="linear",
    out_channels=5,
    layers=2,
    channels=C,
    timesteps=T,
    cleanest=T - 1,
    grid=(H, W),
    patch=8,
)


def build(kind: str, timesteps: int = T, **changes: Any) -> Aggregator:
    """A tiny aggregator whose parameters are all random, none at a special start."""
    torch.manual_seed(0)
    config = AggregatorConfig(kind=kind, **changes)
    model = AGGREGATORS[kind](channels=C, timesteps=timesteps, width=D, cleanest=0, config=config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def random_features(timesteps: int = T) -> Tensor:
    return torch.randn(B, timesteps, H, W, C, generator=torch.Generator().manual_seed(1)) * 4 + 1


def steps_of(kind: str) -> int:
    return 1 if kind == "none" else T


def weights_of(model: Aggregator, timesteps: int) -> Tensor:
    """Of the global aggregator, softmax of its logits; of the others that project, equal ones."""
    if isinstance(model, GlobalAggregator):
        return softmax(model.mixing)
    return torch.full((timesteps,), 1 / timesteps)


def token(values: Tensor, model: Any, norm: str) -> Tensor:
    """What a token's T vectors [T C] become."""
    if isinstance(model, ConcatAggregator):
        normalised = [
            layer_norm(x, layer) if norm == "before_projection" else x
            for x, layer in zip(values, model.norms, strict=True)
        ]
        return dense(torch.cat(normalised), model.linear)
    weights = weights_of(model, len(values))
    fused = torch.zeros(D)
    for weight, x, projection in zip(weights, values, model.projections, strict=True):
        fused += weight * project(x, projection, norm)
    return fused


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "norm"),
    [(kind, norm) for kind in KINDS for norm in NORMS if (kind, norm) != ("concat", "after_projection")],
)
def test_equals_the_equations(kind: str, norm: str) -> None:
    model, features = build(kind, steps_of(kind), norm=norm), random_features(steps_of(kind))
    expected = torch.zeros(B, D, H, W)
    for b in range(B):
        for i in range(H):
            for j in range(W):
                expected[b, :, i, j] = token(features[b, :, i, j], model, norm)
    torch.testing.assert_close(model(features), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_shown_where_there_are_some(kind: str) -> None:
    weights = build(kind, steps_of(kind)).aggregate(random_features(steps_of(kind))).weights
    if kind in ("concat", "none"):
        assert weights is None
        return
    assert weights is not None
    assert weights.shape == (B, T, H, W)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(B, H, W))
    assert (weights == weights[:1, :, :1, :1]).all()
    assert (weights.std(dim=1) > 1e-3).all() == (kind == "global")


@pytest.mark.parametrize("preset", ["appendix_f", "section_3_1"])
@pytest.mark.parametrize("kind", ["mean", "global", "none"])
def test_projections_are_those_of_the_token_aggregator(kind: str, preset: str) -> None:
    """The same parameters in both readings of the paper, so that only the fusion differs."""

    def names(kind: str) -> set[tuple[str, tuple[int, ...]]]:
        state = build(kind, 1, preset=preset).state_dict()
        return {(name, tuple(x.shape)) for name, x in state.items() if name.startswith("projections.")}

    assert names(kind) == names("token")


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(kind: str) -> None:
    model = build(kind, steps_of(kind))
    (model(random_features(steps_of(kind))) ** 2).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@pytest.mark.parametrize("kind", KINDS)
def test_float16_features_are_computed_in_float32(kind: str) -> None:
    model, features = build(kind, steps_of(kind)), random_features(steps_of(kind)).half()
    features[..., 0] = 60000.0  # its square is infinite in float16
    fused = model(features)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, model(features.float()))


@pytest.mark.parametrize("kind", [*KINDS, "token"])
def test_a_whole_model_of_each_kind(kind: str) -> None:
    """Its parts are counted in full, its spec rebuilds it, and it says what timesteps count or nothing."""
    steps = steps_of(kind)
    spec = dataclasses.replace(
        SPEC, timesteps=steps, cleanest=0, aggregator=AggregatorConfig(kind=kind, width=D)
    )
    model, features = (
        MMDiff.from_spec(spec).eval(),
        random_features(steps)[:, :, None].expand(-1, -1, 2, -1, -1, -1),
    )
    again = MMDiff.from_spec(ModelSpec.from_json(model.spec.to_json())).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(model(features), again(features))
    counts = model.parameter_counts()
    assert set(counts) == {"aggregators", "decoder", "head"}
    assert counts["aggregators"] == sum(p.numel() for p in model.aggregators.parameters()) > 0
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    weights = model.aggregation_weights(features)
    assert (weights is None) == (kind in ("concat", "none"))
    assert weights is None or weights.shape == (B, T, 2, H, W)


def test_concat_has_a_norm_a_timestep_in_either_preset() -> None:
    for preset in ("appendix_f", "section_3_1"):
        config = resolve_aggregator(AggregatorConfig(kind="concat", preset=preset))
        assert config.norm == "before_projection"
    with pytest.raises(ConfigError, match=r"aggregator\.kind concat normalises each timestep before"):
        resolve_aggregator(AggregatorConfig(kind="concat", norm="after_projection"))


def test_none_refuses_more_than_one_timestep_and_says_what_to_do() -> None:
    spec = dataclasses.replace(SPEC, aggregator=AggregatorConfig(kind="none", width=D))
    with pytest.raises(
        ConfigError, match=r"kind none takes one timestep, got 3; choose one with --timesteps"
    ):
        resolve_model(spec)


def test_an_unknown_kind_is_refused_with_those_that_there_are() -> None:
    spec = dataclasses.replace(SPEC, aggregator=AggregatorConfig(kind="median", width=D))
    with pytest.raises(ConfigError, match="must be one of token, mean, concat, global, none, got 'median'"):
        resolve_model(spec)
