"""The whole model: rebuilt from its spec, right in size, refusing what does not fit."""

import dataclasses
import json

import pytest
import torch

from mmdiff_cache.config import AggregatorConfig, DecoderName
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.models.mmdiff import (
    MMDiff,
    ModelSpec,
    decoder_upsampling,
    default_decoder_width,
    resolve_model,
)

B, T, L, C, D, K = 2, 3, 2, 12, 8, 4
TINY = ModelSpec(
    decoder="deeplabv3plus",
    out_channels=5,
    layers=L,
    channels=C,
    timesteps=T,
    cleanest=T - 1,
    grid=(4, 6),
    patch=8,
    concepts=K,
    discriminative=(3, 2),
    aggregator=AggregatorConfig(width=D, heads=2, depth=1),
)
FLUX = ModelSpec(
    decoder="deeplabv3plus",
    out_channels=21,
    layers=4,
    channels=3072,
    timesteps=4,
    cleanest=3,
    grid=(32, 32),
    patch=16,
    concepts=4,
    aggregator=AggregatorConfig(width=768),
)
"""FLUX.1-dev at 512 px on VOC with four concepts (Paper: Sec. 3.4)."""
DECODERS: tuple[DecoderName, ...] = ("deeplabv3plus", "dpt", "linear")


def inputs() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(B, T, L, 4, 6, C, generator=generator).half()
    concepts = torch.rand(B, K, 4, 6, generator=generator)
    others = [torch.randn(B, 3, 4, 6, generator=generator), torch.randn(B, 2, 7, 7, generator=generator)]
    return hidden_states, concepts, others


@pytest.mark.parametrize("decoder", DECODERS)
def test_rebuilds_from_json_and_weights(decoder: DecoderName) -> None:
    model = MMDiff.from_spec(dataclasses.replace(TINY, decoder=decoder)).eval()
    text = json.dumps(model.spec.to_json())
    again = MMDiff.from_spec(ModelSpec.from_json(json.loads(text))).eval()
    again.load_state_dict(model.state_dict())
    assert again.spec == model.spec
    assert torch.equal(again(*inputs()), model(*inputs()))


@pytest.mark.parametrize("decoder", DECODERS)
def test_output_is_pixels_of_the_grid_or_any_size(decoder: DecoderName) -> None:
    model = MMDiff.from_spec(dataclasses.replace(TINY, decoder=decoder))
    assert model(*inputs()).shape == (B, 5, 32, 48)
    assert model(*inputs(), size=(15, 20)).shape == (B, 5, 15, 20)


@pytest.mark.parametrize("decoder", DECODERS)
def test_gradient_reaches_every_part_after_one_step(decoder: DecoderName) -> None:
    torch.manual_seed(0)
    model = MMDiff.from_spec(dataclasses.replace(TINY, decoder=decoder)).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        (model(*inputs()) - 1).square().mean().backward()
        optimiser.step()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in missing if not name.endswith("weight_head.bias")] == []


def test_depth_is_positive_and_starts_at_the_typical_depth() -> None:
    torch.manual_seed(0)
    spec = dataclasses.replace(TINY, decoder="dpt", out_channels=1, output="depth", typical_depth=3.5)
    model = MMDiff.from_spec(spec).eval()
    depth = model(*inputs())
    assert depth.min() > 0
    assert depth.log().mean().exp().item() == pytest.approx(3.5, rel=0.5)
    with torch.no_grad():
        model.decoder.head.weight.zero_()
    torch.testing.assert_close(model(*inputs()), torch.full((B, 1, 32, 48), 3.5))


def test_latents_need_no_compression_and_no_norm() -> None:
    """One timestep, one layer, D above P: the baseline that sees the VAE latent alone."""
    spec = dataclasses.replace(
        TINY, source="latents", layers=1, timesteps=1, cleanest=0, channels=4, concepts=0, discriminative=()
    )
    model = MMDiff.from_spec(spec)
    assert model.spec.aggregator.norm == "none"
    assert model(torch.randn(B, 1, 1, 4, 6, 4)).shape == (B, 5, 32, 48)


def test_aggregation_weights_are_those_of_each_layer() -> None:
    model, hidden_states = MMDiff.from_spec(TINY).eval(), inputs()[0]
    weights = model.aggregation_weights(hidden_states)
    assert weights.shape == (B, T, L, 4, 6)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(B, L, 4, 6))


@pytest.mark.parametrize("width", [C, C + 4])
def test_width_must_compress(width: int) -> None:
    spec = dataclasses.replace(TINY, aggregator=AggregatorConfig(width=width, heads=2))
    with pytest.raises(ConfigError, match=r"aggregator\.width must be below the backbone's 12 channels"):
        MMDiff.from_spec(spec)


def test_the_width_that_is_proposed_can_be_had() -> None:
    """Half of twelve is no multiple of four heads."""
    spec = dataclasses.replace(TINY, aggregator=AggregatorConfig(width=C, heads=4))
    with pytest.raises(ConfigError, match=r"--set aggregator\.width=4$"):
        MMDiff.from_spec(spec)
    MMDiff.from_spec(dataclasses.replace(TINY, aggregator=AggregatorConfig(width=4, heads=4)))


def test_missing_or_foreign_guidance_is_refused() -> None:
    model, (hidden_states, concepts, others) = MMDiff.from_spec(TINY), inputs()
    for wrong in ((None, others), (concepts, ()), (concepts[:, :2], others)):
        with pytest.raises(ConfigError, match=r"guidance maps of \[4, 3, 2\] channels"):
            model(hidden_states, *wrong)


def test_features_of_another_shape_are_refused() -> None:
    model, (hidden_states, _, _) = MMDiff.from_spec(TINY), inputs()
    for wrong in (
        hidden_states[:, :2],
        hidden_states[:, :, :1],
        hidden_states.transpose(3, 4),
        hidden_states[..., :8],
    ):
        with pytest.raises(ConfigError, match=r"built for features \[T L h w C\] of \[3, 2, 4, 6, 12\]"):
            model(wrong)


def test_presets_give_different_models() -> None:
    one = MMDiff.from_spec(TINY)
    two = MMDiff.from_spec(
        dataclasses.replace(TINY, aggregator=dataclasses.replace(TINY.aggregator, preset="section_3_1"))
    )
    assert set(one.state_dict()) != set(two.state_dict())


def test_bfloat16_autocast_agrees_with_float32() -> None:
    torch.manual_seed(0)
    model = MMDiff.from_spec(TINY).eval()
    expected = model(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        result = model(*inputs())
    assert result.dtype == torch.float32
    assert (result - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize(("patch", "factor"), [(16, 4), (8, 2), (4, 1), (2, 1), (14, 4), (32, 8)])
def test_decoders_work_at_stride_four(patch: int, factor: int) -> None:
    assert decoder_upsampling(patch) == factor


@pytest.mark.parametrize(("width", "decoder"), [(768, 256), (256, 256), (64, 64), (60, 56), (4, 8)])
def test_decoder_width_follows_the_aggregators(width: int, decoder: int) -> None:
    assert default_decoder_width(width) == decoder


# --- the paper's size, on the meta device: shapes without memory ---


def flux_counts(**changes: object) -> dict[str, int]:
    with torch.device("meta"):
        return dict(MMDiff.from_spec(dataclasses.replace(FLUX, **changes)).parameter_counts())


def test_decoders_total_about_36_million_at_the_papers_size() -> None:
    """One DeepLabV3+ and one DPT, heads included (Sec. 3.4: 'approximately 36M')."""
    segmentation = flux_counts()
    depth = flux_counts(decoder="dpt", out_channels=1, concepts=5)
    total = sum(counts["decoder"] + counts["head"] for counts in (segmentation, depth))
    assert total == pytest.approx(36e6, rel=0.03)


def test_aggregators_total_about_four_times_31_million() -> None:
    """Four layers, each 4 projections 3072 -> 768 and three transformer layers of 12 D^2."""
    counts = flux_counts()
    by_hand = 4 * (4 * 3072 * 768 + 3 * 12 * 768**2 + 768**2)
    assert counts["aggregators"] == pytest.approx(by_hand, rel=0.01)


def test_counts_cover_every_parameter_once() -> None:
    model = MMDiff.from_spec(TINY)
    assert sum(model.parameter_counts().values()) == sum(p.numel() for p in model.parameters())


def test_paper_size_runs_in_shape() -> None:
    with torch.device("meta"):
        model = MMDiff.from_spec(FLUX)
        output = model(torch.empty(1, 4, 4, 32, 32, 3072, dtype=torch.float16), torch.empty(1, 4, 32, 32))
    assert output.shape == (1, 21, 512, 512)


def test_resolving_twice_changes_nothing() -> None:
    once = resolve_model(TINY)
    assert resolve_model(once) == once
    assert once.decoder_width == D
