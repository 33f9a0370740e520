"""What a model reads beside its timesteps and layers: every reading against one written out by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdiff_cache.config import ConceptMapsConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.loader import CachedFeatureDataset, Guide, taken, view_of
from mmdiff_cache.loader.order import partners
from tests.learnable import GRID, LAYERS, TIMESTEPS, make_schema, write_store
from tests.loader.test_dataset import bytes_read


def reading(store: Path, concepts: str | list[Guide], **how: Any) -> CachedFeatureDataset:
    return CachedFeatureDataset(store, concepts=concepts, concept_maps=ConceptMapsConfig(**how))


def slow_maps(scores: np.ndarray, temperature: float, softmax_first: bool) -> np.ndarray:
    """[T block K h w] to [K h w], number by number in Python."""
    steps, blocks, concepts, rows, columns = scores.shape
    out = np.zeros((concepts, rows, columns))

    def softmax(values: list[float]) -> list[float]:
        powers = [float(np.exp(value / temperature)) for value in values]
        return [power / sum(powers) for power in powers]

    for row in range(rows):
        for column in range(columns):
            each = [
                [float(scores[t, b, k, row, column]) for k in range(concepts)]
                for t in range(steps)
                for b in range(blocks)
            ]
            if softmax_first:
                out[:, row, column] = np.mean([softmax(values) for values in each], axis=0)
            else:
                out[:, row, column] = softmax(np.mean(each, axis=0).tolist())
    return out


@pytest.mark.parametrize("order", ["softmax_then_mean", "mean_then_softmax"])
@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
@pytest.mark.parametrize("blocks", [None, ("double.2", "double.1")])
def test_concept_maps_are_those_of_the_slow_reference(
    rich_store: Path, order: str, temperature: float, blocks: tuple[str, ...] | None
) -> None:
    timesteps = (TIMESTEPS[2], TIMESTEPS[0])
    data = reading(
        rich_store, "segmentation", blocks=blocks, timesteps=timesteps, temperature=temperature, reading=order
    )
    maps = data.batch([3, 0]).concepts
    assert maps is not None
    scores = data.reader.concept_scores("segmentation", [3, 0], timesteps)
    places = [0, 2] if blocks is None else [1, 2]
    for row in range(2):
        wanted = slow_maps(scores[row][:, places], temperature, order == "softmax_then_mean")
        np.testing.assert_allclose(maps[row], wanted, atol=1e-5)


def test_a_high_temperature_makes_maps_soft_and_a_low_one_hard(rich_store: Path) -> None:
    soft, hard = (
        reading(rich_store, "depth", temperature=t, reading="mean_then_softmax").batch([1]).concepts
        for t in (1e4, 1e-4)
    )
    assert soft is not None
    assert hard is not None
    torch.testing.assert_close(soft, torch.full_like(soft, 0.5), atol=1e-3, rtol=0)
    assert (hard.amax(dim=1) > 0.999).all()


def test_cross_attention_is_a_channel_a_block(rich_store: Path) -> None:
    """By default the blocks of the concept maps, times the number of image tokens."""
    data = reading(rich_store, "cross_attention", timesteps=(0.26, 0.78))
    stored = data.reader.cross_attention([2, 5], (0.26, 0.78))
    wanted = stored[:, :, [0, 2]].mean(axis=1) * GRID**2
    np.testing.assert_allclose(data.batch([2, 5]).concepts, wanted, rtol=1e-6)
    assert data.concept_names == ("double.0", "double.2")
    one = reading(rich_store, "cross_attention", blocks=("double.1",))
    np.testing.assert_allclose(
        one.batch([2]).concepts, data.reader.cross_attention([2])[:, :, 1:2].mean(axis=1) * 16, rtol=1e-6
    )


@given(st.integers(2, 300))
def test_no_one_is_a_partner_of_itself_and_everyone_is_one_of_another(count: int) -> None:
    found = partners(count)
    assert sorted(found) == list(range(count))
    assert not (found == np.arange(count)).any()


@pytest.mark.parametrize("name", ["segmentation", "cross_attention"])
def test_shuffled_maps_are_those_of_another_sample(rich_store: Path, name: str) -> None:
    own, shuffled = reading(rich_store, name), reading(rich_store, name, shuffled=True)
    few = CachedFeatureDataset(
        rich_store, concepts=name, concept_maps=ConceptMapsConfig(shuffled=True), indices=[4]
    )
    everyone = own.batch(range(8)).concepts
    given_ = shuffled.batch(range(8)).concepts
    assert everyone is not None
    assert given_ is not None
    for sample, other in enumerate(partners(8)):
        assert other != sample
        assert torch.equal(given_[sample], everyone[other])
    assert torch.equal(few.batch([0]).concepts, given_[4:5]), "whatever the subset"
    assert torch.equal(own.batch([3]).hidden_states, shuffled.batch([3]).hidden_states)


def test_shuffling_leaves_out_samples_that_failed(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", train=4, test=1, failing=("blocks-train-000002",))
    maps = reading(store, "depth", shuffled=True).batch(range(3)).concepts
    assert maps is not None
    assert maps.isfinite().all()
    with pytest.raises(ConfigError, match="shuffled gives a sample the maps of another one"):
        CachedFeatureDataset(store, "test", concepts="depth", concept_maps=ConceptMapsConfig(shuffled=True))


def test_a_timestep_may_be_repeated_and_is_read_once(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", train=3, test=1, schema=make_schema(channels=2048))
    once = CachedFeatureDataset(store, timesteps=[0.26], concepts="depth")
    often = CachedFeatureDataset(store, timesteps=[0.26] * 4, concepts="depth")
    costs = []
    for data in (once, often):
        data.batch([0])  # opens arrays
        before = bytes_read()
        batch = data.batch([1, 2])
        costs.append(bytes_read() - before)
    assert costs[1] < 1.1 * costs[0]
    alone = once.batch([1, 2])
    assert batch.hidden_states.shape[1] == 4
    for step in range(4):
        assert torch.equal(batch.hidden_states[:, step], alone.hidden_states[:, 0])
    assert torch.equal(batch.concepts, alone.concepts)


def test_an_encoder_alone_is_the_features(rich_store: Path) -> None:
    data = CachedFeatureDataset(
        rich_store, source="discriminative", discriminative=["eyes"], concepts="depth", memory=1 << 20
    )
    stored = data.reader.discriminative_features("eyes", [6, 1])
    for _ in range(2):
        batch = data.batch([6, 1])
        np.testing.assert_array_equal(batch.hidden_states[:, 0], stored)
        assert batch.discriminative == ()
        assert batch.concepts is not None
    late = CachedFeatureDataset(
        rich_store, source="discriminative", discriminative=["eyes"], layers=["11"], augment_seed=0
    )
    batch = late.batch([2], epoch=1)
    variant = late.variant_of(2, 1)
    np.testing.assert_array_equal(
        batch.hidden_states[0, 0, 0], late.reader.discriminative_features("eyes", [2], variant)[0, 1]
    )
    assert data[6].keys() == {"hidden_states", "concepts", "index"}


@pytest.mark.parametrize("stacked", [False, True])
def test_the_view_of_a_smaller_reading_is_that_reading(rich_store: Path, stacked: bool) -> None:
    how = {"variant_use": "stack"} if stacked else {"augment_seed": 2}
    part: dict[str, Any] = {
        "layers": LAYERS[::2], "timesteps": [0.001, 0.78, 0.78], "concepts": "depth", **how,
    }  # fmt: skip
    small = CachedFeatureDataset(rich_store, **part)
    other = CachedFeatureDataset(rich_store, concepts="segmentation", discriminative=["eyes"], **how)
    whole = CachedFeatureDataset(
        rich_store,
        concepts=[*other.inputs.guides, *small.inputs.guides],
        discriminative=["eyes"],
        labels=("depth",),
        **how,
    )
    batch = whole.batch([7, 0, 3], epoch=1)
    for data in (small, other):
        alone = data.batch([7, 0, 3], epoch=1)
        seen = taken(batch, view_of(data.inputs, whole.inputs))
        assert torch.equal(seen.hidden_states, alone.hidden_states)
        assert torch.equal(seen.concepts, alone.concepts)
        assert len(seen.discriminative) == len(alone.discriminative)
        assert all(map(torch.equal, seen.discriminative, alone.discriminative))
        assert (seen.ids, seen.targets.keys()) == (alone.ids, {"depth"})
    assert taken(batch, view_of(whole.inputs, whole.inputs)).hidden_states.data_ptr() == (
        batch.hidden_states.data_ptr()
    )


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        (
            {"concepts": "depth", "concept_maps": {"blocks": ("double.9",)}},
            "block of depth 'double.9' .* stored",
        ),
        ({"concepts": "depth", "concept_maps": {"timesteps": (0.5,)}}, "timestep 0.5 .* stored"),
        ({"concept_maps": {"shuffled": True}}, "shuffled needs concept maps"),
        (
            {"concepts": "cross_attention", "concept_maps": {"temperature": 2.0}},
            "of a softmax over concepts, which cross_attention has not",
        ),
        ({"source": "discriminative"}, "exactly one encoder, got 0"),
        (
            {"source": "discriminative", "discriminative": ["eyes"], "layers": ["single.1"]},
            "block of eyes 'single.1' .* stored: 2, 11",
        ),
        ({"source": "latents", "concepts": "depth"}, "nothing of the transformer, .* got 'depth'"),
        ({"source": "images", "discriminative": ["eyes"]}, "uses the pictures alone"),
    ],
)
def test_what_cannot_be_read_is_refused(rich_store: Path, choices: dict[str, Any], says: str) -> None:
    choices = dict(choices)
    if "concept_maps" in choices:
        choices["concept_maps"] = ConceptMapsConfig(**choices["concept_maps"])
    with pytest.raises(ConfigError, match=says):
        CachedFeatureDataset(rich_store, **choices)


def test_a_store_without_attention_maps_says_how_to_get_them(learnable_store: Path) -> None:
    with pytest.raises(ConfigError, match="extract with --cross-attention"):
        reading(learnable_store, "cross_attention")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_is_a_positive_number(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature must be positive"):
        ConceptMapsConfig(temperature=temperature)
