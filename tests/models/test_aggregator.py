"""The aggregator against the paper's equations, written out position by position in float64."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from mmdiff_cache.config import AggregatorConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.models.aggregator import TokenAggregator, resolve_aggregator
from mmdiff_cache.models.temporal import Block, PairwiseAttention, TemporalTransformer, add_dropped
from tests.models.equations import cbam, dense, gelu, layer_norm, project, softmax

B, T, H, W, C, D, HEADS = 2, 3, 4, 5, 12, 8, 2
SMALL = AggregatorConfig(heads=HEADS, mlp_ratio=2.0, depth=2)
LATER = 0.3
"""A LayerScale as it may be after training; at 1e-6 a wrong branch would not show."""


def build(
    config: AggregatorConfig = SMALL, *, timesteps: int = T, cleanest: int | None = None
) -> TokenAggregator:
    """A tiny aggregator in evaluation mode whose parameters are all random, none at a special start."""
    torch.manual_seed(0)
    model = TokenAggregator(
        channels=C,
        timesteps=timesteps,
        width=D,
        cleanest=timesteps - 1 if cleanest is None else cleanest,
        config=config,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def random_features(timesteps: int = T) -> Tensor:
    return torch.randn(B, timesteps, H, W, C, generator=torch.Generator().manual_seed(1)) * 4 + 1


# --- the reference: plain vectors and lists, one grid position at a time ---


def attend(sequence: list[Tensor], block: Block) -> list[Tensor]:
    """Multi-head attention over a list of T vectors [D], head by head and pair by pair."""
    attention, size = block.attention, D // HEADS
    qkv = [dense(x, attention.qkv).view(3, HEADS, size) for x in sequence]
    mixed: list[Tensor] = []
    for t in range(len(sequence)):
        heads: list[Tensor] = []
        for head in range(HEADS):
            scores = torch.stack([qkv[t][0, head] @ other[1, head] / math.sqrt(size) for other in qkv])
            shares = softmax(scores)
            heads.append(sum((shares[s] * qkv[s][2, head] for s in range(len(qkv))), torch.zeros(size)))
        mixed.append(dense(torch.cat(heads), attention.out))
    return mixed


def transform(sequence: list[Tensor], model: TokenAggregator) -> list[Tensor]:
    sequence = [x + p[0] for x, p in zip(sequence, model.transformer.positions, strict=True)]
    for block in model.transformer.blocks:
        assert isinstance(block, Block)
        branch = attend([layer_norm(x, block.attention_norm) for x in sequence], block)
        sequence = [x + block.attention_scale * y for x, y in zip(sequence, branch, strict=True)]
        hidden = [gelu(dense(layer_norm(x, block.mlp_norm), block.mlp_in)) for x in sequence]
        branch = [dense(x, block.mlp_out) for x in hidden]
        sequence = [x + block.mlp_scale * y for x, y in zip(sequence, branch, strict=True)]
    return sequence


def reference(features: Tensor, model: TokenAggregator) -> tuple[Tensor, Tensor]:
    """Fused map [B D h w] and weights [B T h w] from the equations of Sec. 3.1 and App. F."""
    config, batch, steps = model.config, features.shape[0], features.shape[1]
    fused, skips = torch.zeros(batch, D, H, W), torch.zeros(batch, D, H, W)
    weights = torch.zeros(batch, steps, H, W)
    for b in range(batch):
        for i in range(H):
            for j in range(W):
                projected = [
                    project(features[b, t, i, j], model.projections[t], str(config.norm))
                    for t in range(steps)
                ]
                transformed = transform(projected, model)
                logits = torch.cat([dense(x, model.weight_head) for x in transformed])
                alpha = softmax(logits)
                values = transformed if config.weights_on == "transformed" else projected
                weights[b, :, i, j] = alpha
                fused[b, :, i, j] = sum((a * x for a, x in zip(alpha, values, strict=True)), torch.zeros(D))
                clean = projected[model.cleanest]
                if config.skip == "gated":
                    assert model.skip_projection is not None
                    clean = model.gate * dense(clean, model.skip_projection)
                skips[b, :, i, j] = clean
    if config.cbam == "after_skip":
        return cbam(fused + skips, model.cbam), weights
    return cbam(fused, model.cbam) + skips, weights


@pytest.mark.parametrize("preset", ["appendix_f", "section_3_1"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm": "before_projection"},
        {"norm": "after_projection"},
        {"norm": "none"},
        {"skip": "gated"},
        {"skip": "plain"},
        {"cbam": "after_skip"},
        {"cbam": "before_skip"},
        {"weights_on": "transformed"},
        {"weights_on": "projected"},
    ],
    ids=lambda change: "-".join(map(str, *change.items())) if change else "preset",
)
def test_equals_the_equations(preset: str, change: dict[str, str]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        config = dataclasses.replace(SMALL, preset=preset, layer_scale=LATER, **change)
        model = build(config, cleanest=1).double()
        features = random_features()[:1].double()
        fused, weights = reference(features, model)
    finally:
        torch.set_default_dtype(torch.float32)
    result = model.float().aggregate(features.float())
    torch.testing.assert_close(result.fused, fused.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.weights, weights.float(), rtol=1e-4, atol=1e-6)


def test_presets_read_the_paper() -> None:
    """App. F and Sec. 3.1 as design and docs/paper-notes.md list them."""
    appendix = resolve_aggregator(AggregatorConfig())
    assert (appendix.layer_scale, appendix.norm, appendix.skip, appendix.cbam, appendix.weights_on) == (
        1e-6,
        "before_projection",
        "gated",
        "after_skip",
        "transformed",
    )
    section = resolve_aggregator(AggregatorConfig(preset="section_3_1"))
    assert (section.layer_scale, section.norm, section.skip, section.cbam, section.weights_on) == (
        1e-4,
        "after_projection",
        "plain",
        "before_skip",
        "projected",
    )
    assert (appendix.depth, appendix.heads, appendix.dropout) == (3, 8, 0.1)


@pytest.mark.parametrize("preset", ["appendix_f", "section_3_1"])
@pytest.mark.parametrize(
    "change",
    [
        {"layer_scale": 0.5},
        {"norm": "none"},
        {"norm": "before_projection"},
        {"norm": "after_projection"},
        {"skip": "gated"},
        {"skip": "plain"},
        {"cbam": "after_skip"},
        {"cbam": "before_skip"},
        {"weights_on": "transformed"},
        {"weights_on": "projected"},
    ],
    ids=str,
)
def test_each_field_overrides_its_preset_alone(preset: str, change: dict[str, object]) -> None:
    base = resolve_aggregator(AggregatorConfig(preset=preset))
    changed = resolve_aggregator(AggregatorConfig(preset=preset, **change))
    assert changed == dataclasses.replace(base, **change)


@pytest.mark.parametrize("preset", ["appendix_f", "section_3_1"])
def test_weights_are_positive_and_sum_to_one_everywhere(preset: str) -> None:
    weights = build(dataclasses.replace(SMALL, preset=preset)).aggregate(random_features()).weights
    assert weights.shape == (B, T, H, W)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(B, H, W))


def test_weights_vary_from_token_to_token() -> None:
    weights = build().aggregate(random_features()).weights
    assert weights.std(dim=(2, 3)).min() > 1e-3


@pytest.mark.parametrize("preset", ["appendix_f", "section_3_1"])
def test_one_timestep_equals_the_equations(preset: str) -> None:
    config = dataclasses.replace(SMALL, preset=preset, layer_scale=LATER)
    model, features = build(config, timesteps=1), random_features(1)
    fused, _ = reference(features, model)
    torch.testing.assert_close(model(features), fused, rtol=1e-4, atol=1e-5)


def test_one_timestep_has_weight_one() -> None:
    result = build(timesteps=1).aggregate(random_features(1))
    assert (result.weights == 1).all()
    assert result.fused.shape == (B, D, H, W)


def test_cleanest_decides_which_timestep_is_added_back() -> None:
    """With the same weights, another cleanest index gives another map; the weights do not change."""
    features, one, two = random_features(), build(cleanest=0), build(cleanest=2)
    assert not torch.allclose(one(features), two(features), atol=1e-3)
    torch.testing.assert_close(one.aggregate(features).weights, two.aggregate(features).weights)


def test_positions_are_independent_before_cbam() -> None:
    """What the weights are at one token depends on that token alone."""
    model, features = build(), random_features()
    changed = features.clone()
    changed[0, :, 1, 2, 0] += 1.0  # one channel: a constant on all would vanish in the norm
    difference = (model.aggregate(features).weights - model.aggregate(changed).weights).abs().amax(dim=1)
    assert difference[0, 1, 2] > 1e-4
    difference[0, 1, 2] = 0
    assert difference.max() < 1e-6


def test_samples_are_independent_of_their_batch() -> None:
    model, features = build(), random_features()
    torch.testing.assert_close(model(features)[:1], model(features[:1]), rtol=1e-5, atol=1e-6)


def test_float16_features_are_computed_in_float32() -> None:
    model, features = build(), random_features().half()
    features[..., 0] = 60000.0  # its square is infinite in float16
    fused = model(features)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, model(features.float()))
    assert fused.isfinite().all()


@pytest.mark.parametrize("preset", ["appendix_f", "section_3_1"])
def test_gradient_reaches_every_parameter(preset: str) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, preset=preset)
    model = TokenAggregator(channels=C, timesteps=T, width=D, cleanest=T - 1, config=config).train()
    (model(random_features()) ** 2).sum().backward()
    without = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    # A constant added to all timesteps' logits leaves the softmax as it is.
    assert without in ([], ["weight_head.bias"])


def test_equal_weights_leave_all_else_as_it_is() -> None:
    model = build(dataclasses.replace(SMALL, weighing="equal"))
    learned, features = build(), random_features()
    kept = {name: p for name, p in learned.state_dict().items() if not name.startswith("weight_head")}
    model.load_state_dict(kept)
    found = model.aggregate(features).weights
    torch.testing.assert_close(found, torch.full((B, T, H, W), 1 / T))
    with torch.no_grad():
        assert learned.weight_head is not None
        learned.weight_head.weight.zero_()
    torch.testing.assert_close(model(features), learned(features))


def test_starts_as_the_mean_over_timesteps_of_what_was_projected() -> None:
    """LayerScale makes the fresh transformer the identity, and the weights start nearly equal (App. F)."""
    torch.manual_seed(0)
    model = TokenAggregator(channels=C, timesteps=T, width=D, cleanest=0, config=SMALL).eval()
    features = random_features()
    projected = torch.stack(model.projections(features))
    transformed = model.transformer(projected)
    torch.testing.assert_close(transformed, projected + model.transformer.positions, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.aggregate(features).weights, torch.full((B, T, H, W), 1 / T), rtol=0, atol=0.1
    )


@pytest.mark.parametrize(("width", "cleanest"), [(10, 0), (8, 3), (8, -1)])
def test_refuses_what_cannot_hold(width: int, cleanest: int) -> None:
    with pytest.raises(ConfigError, match=r"aggregator\.(width|heads)|cleanest"):
        TokenAggregator(
            channels=C, timesteps=T, width=width, cleanest=cleanest, config=AggregatorConfig(heads=4)
        )


def test_transformer_and_its_gradients_are_those_of_pytorchs_own() -> None:
    """Pre-norm nn.TransformerEncoder with the same weights, LayerScale multiplied into its matrices."""
    torch.manual_seed(0)
    ours = TemporalTransformer(
        timesteps=T, width=D, depth=2, heads=HEADS, mlp_ratio=2.0, dropout=0.0, layer_scale=LATER
    )
    layer = nn.TransformerEncoderLayer(
        D, HEADS, 2 * D, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with torch.no_grad():
        for mine, other in zip(ours.blocks, theirs.layers, strict=True):
            assert isinstance(mine, Block)
            assert isinstance(other, nn.TransformerEncoderLayer)
            pairs = [
                (other.self_attn.in_proj_weight, mine.attention.qkv.weight),
                (other.self_attn.in_proj_bias, mine.attention.qkv.bias),
                (other.self_attn.out_proj.weight, LATER * mine.attention.out.weight),
                (other.self_attn.out_proj.bias, LATER * mine.attention.out.bias),
                (other.linear1.weight, mine.mlp_in.weight),
                (other.linear1.bias, mine.mlp_in.bias),
                (other.linear2.weight, LATER * mine.mlp_out.weight),
                (other.linear2.bias, LATER * mine.mlp_out.bias),
            ]
            for target, source in pairs:
                target.copy_(source)
    x = torch.randn(T, 7, D, requires_grad=True)
    mine, other = ours(x), theirs((x + ours.positions).transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(mine)
    torch.testing.assert_close(
        torch.autograd.grad(mine, x, grad), torch.autograd.grad(other, x, grad), rtol=1e-4, atol=1e-5
    )


def test_attention_has_the_gradients_of_its_formula() -> None:
    """By finite differences in float64, and against autograd through the plain formula."""
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 3, T, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PairwiseAttention.apply, (qkv,))
    q, k, v = qkv
    scores = torch.einsum("hdtm,hdsm->htsm", q, k) / math.sqrt(3)
    plain = torch.einsum("htsm,hdsm->hdtm", scores.softmax(dim=2), v)
    result = PairwiseAttention.apply(qkv)
    torch.testing.assert_close(result, plain)
    weight = torch.randn_like(plain)
    (mine,), (theirs,) = (torch.autograd.grad(x, qkv, weight) for x in (result, plain))
    torch.testing.assert_close(mine, theirs)


def test_dropout_keeps_the_mean_and_meets_its_rate() -> None:
    torch.manual_seed(0)
    x, branch = torch.full((5, 1001, 40), 2.0), torch.ones(5, 1001, 40)
    added = add_dropped(x, branch, 0.1) - x
    kept = added != 0
    assert kept.float().mean().item() == pytest.approx(0.9, abs=0.003)
    assert added[kept].unique().numel() == 1
    assert added.mean().item() == pytest.approx(1.0, abs=0.004)
    # Four values share one random number; their fates must not.
    shares = kept.flatten()[: kept.numel() // 4 * 4].view(-1, 4).float()
    assert (torch.corrcoef(shares.T) - torch.eye(4)).abs().max() < 0.02
    assert shares.mean(dim=0).sub(0.9).abs().max() < 0.005


def test_dropout_repeats_with_the_seed_and_passes_gradients_of_what_it_kept() -> None:
    x, branch = torch.zeros(2, 7, 3), torch.randn(2, 7, 3, requires_grad=True)
    torch.manual_seed(3)
    first = add_dropped(x, branch, 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, add_dropped(x, branch, 0.5))
    first.sum().backward()
    assert branch.grad is not None
    torch.testing.assert_close(branch.grad, torch.where(first == 0, 0.0, 2.0))
    assert torch.equal(add_dropped(x, branch, 0.0), branch)


def test_a_dropout_next_to_one_keeps_finite_numbers() -> None:
    assert add_dropped(torch.zeros(8, 50, 40), torch.ones(8, 50, 40), 0.999999).isfinite().all()


def test_only_training_drops() -> None:
    model, features = build(), random_features()
    assert torch.equal(model(features), model(features))
    model.train()
    assert not torch.equal(model(features), model(features))


@pytest.mark.parametrize(
    "change",
    [{"dropout": 1.0}, {"dropout": -0.1}, {"heads": 0}, {"depth": -1}, {"width": 0}, {"mlp_ratio": 0.0}],
)
def test_values_out_of_range_are_refused_by_name(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"aggregator\.{next(iter(change))} must"):
        AggregatorConfig(**change)
