"""From prepared samples to a batch of features: shapes, order, range audit, failures, reproducibility."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from mmdiff_cache.backbones.flux import FluxBackbone
from mmdiff_cache.backbones.registry import describe, load_backbone
from mmdiff_cache.config import NoiseConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.extraction.extractor import Extractor, failures, norm_entropy, store_as_float16
from mmdiff_cache.extraction.variants import variants_of
from mmdiff_cache.records import STATISTICS, FeatureBatch, PreparedSample
from mmdiff_cache.store.schema import Variant

LAYERS = ("single.3", "double.0", "single.1")
TIMESTEPS = (0.78, 0.26, 0.001)
VOCABULARIES = {"things": ("object", "background", "sky"), "depth": ("near", "far")}


def sample(number: int, prompt: str = "") -> PreparedSample:
    image = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return PreparedSample(
        sample_id=f"picture-{number}",
        image=image,
        prompt=prompt,
        labels={},
        original_labels={},
        content_hash="",
    )


def make_extractor(
    backbone: FluxBackbone,
    layers: Sequence[str] = LAYERS,
    timesteps: Sequence[float] = TIMESTEPS,
    noise: NoiseConfig | None = None,
    variants: Sequence[Variant] = (Variant(),),
) -> Extractor:
    return Extractor(
        backbone,
        layers=layers,
        timesteps=timesteps,
        vocabularies=VOCABULARIES,
        noise=noise or NoiseConfig(),
        guidance=3.5,
        variants=variants,
    )


def same_bits(one: FeatureBatch, other: FeatureBatch) -> bool:
    arrays = [
        (one.hidden_states, other.hidden_states),
        (one.latents, other.latents),
        (one.audit, other.audit),
    ]
    arrays += [(one.concept_scores[name], other.concept_scores[name]) for name in VOCABULARIES]
    arrays += [(one.concept_maps[name], other.concept_maps[name]) for name in VOCABULARIES]
    return all(a.tobytes() == b.tobytes() for a, b in arrays)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_axes_and_types_are_those_of_the_contract(tiny_backbone: FluxBackbone) -> None:
    features = make_extractor(tiny_backbone)([sample(0), sample(1)])
    assert features.hidden_states.shape == (2, 1, 3, 3, 4, 4, 32)
    assert features.hidden_states.dtype == np.float16
    assert features.latents.shape == (2, 4, 4, 16)
    assert features.audit.shape == (2, 1, 3, 3, len(STATISTICS))
    for name, words in VOCABULARIES.items():
        assert features.concept_scores[name].shape == (2, 1, 3, 2, len(words), 4, 4)
        assert features.concept_maps[name].shape == (2, 1, len(words), 4, 4)
        np.testing.assert_allclose(features.concept_maps[name].sum(axis=2), 1, rtol=1e-5)
    float32 = (
        features.latents,
        features.audit,
        *features.concept_scores.values(),
        *features.concept_maps.values(),
    )
    assert {array.dtype for array in float32} == {np.dtype(np.float32)}


def test_layers_and_timesteps_come_in_the_order_asked_for(tiny_backbone: FluxBackbone) -> None:
    base = make_extractor(tiny_backbone)([sample(0), sample(1)])
    turned = make_extractor(tiny_backbone, layers=LAYERS[::-1], timesteps=TIMESTEPS[::-1])(
        [sample(0), sample(1)]
    )
    np.testing.assert_array_equal(turned.hidden_states, base.hidden_states[:, :, ::-1, ::-1])
    maps = {values.tobytes() for values in base.hidden_states.reshape(18, -1)}
    assert len(maps) == 18


def test_a_samples_features_follow_it_through_the_batch(tiny_backbone: FluxBackbone) -> None:
    extractor = make_extractor(tiny_backbone)
    samples = [sample(0, "near"), sample(1), sample(2, "sky")]
    base, turned = extractor.capture(samples), extractor.capture(samples[::-1])
    assert relative(turned.hidden_states.flip(0), base.hidden_states) <= 1e-6
    assert relative(turned.latents.flip(0), base.latents) <= 1e-6
    for name in VOCABULARIES:
        assert relative(turned.concept_scores[name].flip(0), base.concept_scores[name]) <= 1e-5


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batch_sizes_agree_within_the_stated_tolerance(size: int, tiny_backbone: FluxBackbone) -> None:
    """Relative L2 of 1e-6 in float32, each (sample, timestep, layer) map on its own, before the cast."""
    extractor = make_extractor(tiny_backbone)
    samples = [sample(number, prompt="near" * (number % 2)) for number in range(6)]
    base = extractor.capture(samples)
    for start in range(0, 6, size):
        part = extractor.capture(samples[start : start + size])
        for got, expected in zip(
            part.hidden_states.flatten(0, 2),
            base.hidden_states[start : start + size].flatten(0, 2),
            strict=True,
        ):
            assert relative(got, expected) <= 1e-6
        assert relative(part.latents, base.latents[start : start + size]) <= 1e-6


def test_the_same_batch_gives_the_same_bits(tiny_flux_folder: Path, tiny_backbone: FluxBackbone) -> None:
    """Also in another process' place: a fresh model, and after other batches and prompts."""
    samples = [sample(0, "near"), sample(1, "far")]
    used = make_extractor(tiny_backbone)
    used([sample(5, "sky"), sample(6), sample(7)])
    fresh = load_backbone(describe(str(tiny_flux_folder)), layers=LAYERS)
    assert isinstance(fresh, FluxBackbone)
    assert same_bits(used(samples), make_extractor(fresh)(samples))


def test_features_of_a_truncated_model_are_bit_equal(
    tiny_flux_folder: Path, tiny_backbone: FluxBackbone
) -> None:
    layers = ("single.1", "double.1")
    short = load_backbone(describe(str(tiny_flux_folder)), layers=layers)
    assert isinstance(short, FluxBackbone)
    assert "single.2" not in short.blocks
    whole = make_extractor(tiny_backbone, layers=layers)([sample(0), sample(1)])
    assert same_bits(whole, make_extractor(short, layers=layers)([sample(0), sample(1)]))
    with pytest.raises(ConfigError, match=r"single\.2 was left out when"):
        make_extractor(short, layers=["single.2"])


def test_an_unknown_layer_is_refused(tiny_backbone: FluxBackbone) -> None:
    with pytest.raises(ConfigError, match=r"layer single\.4 is not a block of .* \(double\.0\.\.double\.1, "):
        make_extractor(tiny_backbone, layers=["single.4"])


def test_prompts_noise_and_pictures_all_matter(tiny_backbone: FluxBackbone) -> None:
    base = make_extractor(tiny_backbone)([sample(0)])
    variants = {
        "prompt": make_extractor(tiny_backbone)([sample(0, "near")]),
        "seed": make_extractor(tiny_backbone, noise=NoiseConfig(seed=1))([sample(0)]),
        "form": make_extractor(tiny_backbone, noise=NoiseConfig(form="vp"))([sample(0)]),
        "picture": make_extractor(tiny_backbone)([sample(1)]),
    }
    for name, features in variants.items():
        assert not np.array_equal(features.hidden_states, base.hidden_states), name
        assert np.array_equal(features.latents, base.latents) == (name != "picture"), name


def poison(
    value: float, row: int
) -> Callable[[nn.Module, tuple[object, ...], tuple[Tensor, Tensor]], object]:
    """A hook that spoils one value of one row of a block's image output."""

    def spoil(_m: nn.Module, _i: tuple[object, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        image = output[1].clone()
        image[row, 0, 0] = value
        return output[0], image

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_fails_its_sample_and_no_other(
    value: float, tiny_backbone: FluxBackbone
) -> None:
    extractor = make_extractor(tiny_backbone)
    samples = [sample(0), sample(1), sample(2)]
    clean = extractor(samples)
    row = 1 * len(TIMESTEPS) + 2
    handle = tiny_backbone.blocks["single.1"].block.register_forward_hook(poison(value, row))
    try:
        spoilt = extractor(samples)
    finally:
        handle.remove()
    assert failures(clean, LAYERS, TIMESTEPS) == {}
    reasons = failures(spoilt, LAYERS, TIMESTEPS)
    assert list(reasons) == [1]
    assert "at t=0.001 are not finite" in reasons[1]
    for other in (0, 2):
        np.testing.assert_array_equal(spoilt.hidden_states[other], clean.hidden_states[other])
        np.testing.assert_array_equal(spoilt.audit[other], clean.audit[other])
    counts = spoilt.audit[1, 0, ..., STATISTICS.index("non_finite")]
    assert (counts[:2] == 0).all()
    assert counts[2, LAYERS.index("single.1")] == 1


def test_scores_that_are_not_finite_fail_their_sample_too(tiny_backbone: FluxBackbone) -> None:
    features = make_extractor(tiny_backbone)([sample(0), sample(1)])
    features.concept_scores["depth"][1, 0, 0, 0, 0, 0, 0] = np.nan
    assert failures(features, LAYERS, TIMESTEPS) == {1: "concept scores of vocabulary 'depth' are not finite"}


@given(
    hnp.arrays(
        np.float32,
        (1, 1, 1, 2, 3, 4),
        elements=st.floats(width=32, allow_nan=True, allow_infinity=True)
        | st.sampled_from([65504.0, 65520.0, 1e-8]),
    )
)
def test_the_cast_clamps_and_every_change_is_counted(values: np.ndarray) -> None:
    stored, audit = store_as_float16(torch.from_numpy(values))
    counts = dict(zip(STATISTICS, audit.reshape(-1).tolist(), strict=True))
    finite = np.isfinite(values)
    expected = np.clip(values, -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(stored.numpy(), expected)
    assert np.isfinite(stored.numpy()[finite]).all()
    assert counts["non_finite"] == (~finite).sum()
    assert counts["clipped"] == (finite & (np.abs(values) > 65504)).sum()
    assert counts["flushed"] == ((expected == 0) & (values != 0)).sum()
    if finite.all() and np.abs(values).max() < 1e15:
        wide = values.astype(np.float64)
        assert counts["max_abs"] == np.abs(values).max()
        coarse = 1e-5 * np.abs(wide).max() + np.finfo(np.float32).tiny  # below it float32 has few digits left
        np.testing.assert_allclose(counts["mean"], wide.mean(), rtol=1e-4, atol=coarse)
        np.testing.assert_allclose(counts["rms"], np.sqrt((wide**2).mean()), rtol=1e-4, atol=1e-18)


def test_the_largest_bfloat16_below_float16s_infinity_survives() -> None:
    """Clamped in bfloat16, the bound itself would be 65536 and the value infinite."""
    values = torch.full((1, 1, 1, 1, 1, 2), 65280.0, dtype=torch.bfloat16)
    values[..., 1] = 70000.0
    stored, audit = store_as_float16(values)
    assert stored.flatten().tolist() == [65280.0, 65504.0]
    assert audit[..., STATISTICS.index("clipped")].item() == 1


@given(hnp.arrays(np.float32, (4, 5, 3), elements=st.floats(-100, 100, width=32)))
def test_entropy_is_that_of_numpys_histogram(values: np.ndarray) -> None:
    norms = np.linalg.norm(torch.from_numpy(values).flatten(0, 1).numpy(), axis=-1)
    expected = 0.0
    if norms.max() > 0:
        scaled = norms / norms.max()
        if np.abs(scaled * 64 - np.round(scaled * 64))[scaled < 1].min(initial=1) < 1e-3:
            return  # a norm on the edge between two bins may round into either
        shares = np.histogram(scaled, bins=64, range=(0, 1))[0] / len(norms)
        expected = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    assert float(norm_entropy(torch.from_numpy(values))) == pytest.approx(expected, abs=1e-5)


def test_entropy_of_maps_without_a_spread() -> None:
    assert float(norm_entropy(torch.zeros(3, 3, 2))) == 0
    assert float(norm_entropy(torch.ones(3, 3, 2))) == 0
    assert torch.isnan(norm_entropy(torch.full((3, 3, 2), torch.nan)))
    two = torch.zeros(2, 2, 1)
    two[0] = 1
    assert float(norm_entropy(two)) == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_variants_are_other_noise_and_the_mirrored_picture(tiny_backbone: FluxBackbone, shared: bool) -> None:
    """Each is a pass of its own: the first has the bits of a run without variants."""
    given_samples, noise = [sample(0, "a ball on the left"), sample(1)], NoiseConfig(shared=shared)
    both = make_extractor(tiny_backbone, noise=noise, variants=variants_of(2, flip=True))(given_samples)
    assert both.hidden_states.shape == (2, 4, 3, 3, 4, 4, 32)
    assert both.audit.shape[1] == both.concept_maps["depth"].shape[1] == 4
    plain = make_extractor(tiny_backbone, noise=noise)(given_samples)
    assert both.hidden_states[:, :1].tobytes() == plain.hidden_states.tobytes()
    assert both.latents.tobytes() == plain.latents.tobytes()
    twin = [replace(one, image=one.image[:, ::-1].copy()) for one in given_samples]
    twin[0] = replace(twin[0], prompt="a ball on the right")
    mirrored = make_extractor(tiny_backbone, noise=noise)(twin)
    assert both.hidden_states[:, 2:3].tobytes() == mirrored.hidden_states.tobytes()
    assert both.concept_scores["things"][:, 2:3].tobytes() == mirrored.concept_scores["things"].tobytes()
    maps = both.hidden_states[0].reshape(4, -1)
    assert all(not np.array_equal(maps[i], maps[j]) for i in range(4) for j in range(i))
