"""A sample is read in the variant that seed and epoch give it, its labels mirrored with it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.loader import CachedFeatureDataset, make_loader
from mmdiff_cache.loader.order import drawn_variant
from mmdiff_cache.store.concepts import concept_maps, map_blocks
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.schema import Variant
from tests.learnable import CHANNELS, GRID, LAYERS, TIMESTEPS, make_rich_schema, write_store


def augmented(store: Path, **changes: object) -> CachedFeatureDataset:
    choices: dict[str, object] = {
        "concepts": "segmentation",
        "labels": ("segmentation", "depth"),
        "discriminative": ["eyes"],
        "augment_seed": 5,
    }
    return CachedFeatureDataset(store, **{**choices, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", [0, 1 << 24])
def test_a_batch_is_its_variants_read_by_hand(rich_store: Path, memory: int) -> None:
    data, seen = augmented(rich_store, memory=memory), set()
    reader, schema = data.reader, data.store.manifest.schema
    for epoch in range(3):
        batch = data.batch(range(8), data.slots(8, 1), epoch=epoch)
        for row in range(8):
            variant = data.variant_of(row, epoch)
            seen.add(variant)
            stored = reader.hidden_states([row], variant=variant)[0]
            np.testing.assert_array_equal(batch.hidden_states[row], stored)
            scores = reader.concept_scores("segmentation", [row], variant=variant)
            assert batch.concepts is not None
            np.testing.assert_array_equal(
                batch.concepts[row], concept_maps(scores, map_blocks(schema, "segmentation"))[0]
            )
            eyes = reader.discriminative_features("eyes", [row], variant)[0]
            np.testing.assert_array_equal(batch.discriminative[0][row, :24], eyes[0].transpose(2, 0, 1))
            for name in ("segmentation", "depth"):
                label = reader.labels(name, [row])[0]
                wanted = np.flip(label, axis=1) if reader.variants[variant].flipped else label
                np.testing.assert_array_equal(batch.targets[name][row], wanted)
    assert seen == {0, 1, 2, 3}


def test_the_features_of_a_mirrored_variant_show_its_labels(rich_store: Path) -> None:
    """The largest of the first channels is the class: only if features and labels are mirrored alike."""
    data = augmented(rich_store, variants=[2, 3])
    batch = data.batch(range(8))
    shown = batch.hidden_states.float().mean(dim=(1, 2))[..., :4].argmax(dim=-1)
    centres = batch.targets["segmentation"][:, 4::8, 4::8]
    assert (shown == centres).float().mean() > 0.95
    assert {data.variant_of(sample, 0) for sample in range(8)} == {2, 3}


def test_the_variant_depends_on_seed_epoch_and_sample_alone(rich_store: Path) -> None:
    whole, few = augmented(rich_store), augmented(rich_store, indices=[6, 1])
    for epoch in range(4):
        assert [few.variant_of(sample, epoch) for sample in (6, 1)] == [
            whole.variant_of(sample, epoch) for sample in (6, 1)
        ]
        both = few.batch([0, 1], epoch=epoch), whole.batch([6, 1], epoch=epoch)
        assert torch.equal(both[0].hidden_states, both[1].hidden_states)
    draws = {
        (seed, epoch): [drawn_variant(sample, 4, seed=seed, epoch=epoch) for sample in range(1000)]
        for seed in range(2)
        for epoch in range(3)
    }
    assert len({tuple(draw) for draw in draws.values()}) == 6
    for draw in draws.values():
        counts = np.bincount(draw, minlength=4)
        assert len(counts) == 4
        assert abs(counts - 250).max() < 5 * np.sqrt(1000 * 0.25 * 0.75)


def test_draws_are_frozen() -> None:
    """Checkpoints of today must go on tomorrow with the same variants."""
    found = [drawn_variant(sample, 4, seed=7, epoch=3) for sample in range(12)]
    assert found == [
        1,
        0,
        2,
        3,
        2,
        2,
        3,
        2,
        2,
        0,
        2,
        3,
    ]


def test_the_loader_counts_epochs_wherever_it_starts(rich_store: Path) -> None:
    data = augmented(rich_store, layers=LAYERS[:1])
    whole = list(make_loader(data, 3, seed=1, drop_last=True, steps=7))
    rest = list(make_loader(data, 3, seed=1, drop_last=True, start=3, steps=4))
    for one, other in zip(whole[3:], rest, strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.hidden_states, other.hidden_states)
        assert torch.equal(one.targets["depth"], other.targets["depth"])
    for step, batch in enumerate(whole):
        for row, sample in enumerate(batch.indices.tolist()):
            stored = data.reader.hidden_states(
                [sample], layers=LAYERS[:1], variant=data.variant_of(sample, step // 2)
            )
            np.testing.assert_array_equal(batch.hidden_states[row], stored[0])


def test_without_augmentation_it_is_the_first_that_is_not_mirrored(tmp_path: Path) -> None:
    variants = (Variant(noise_draw=0, flipped=True), Variant(noise_draw=1), Variant(noise_draw=0))
    store = write_store(tmp_path / "store", train=2, test=1, schema=make_rich_schema(variants=variants))
    data = CachedFeatureDataset(store)
    assert data.variant_of(1, 3) == 1
    np.testing.assert_array_equal(data.batch([1]).hidden_states, data.reader.hidden_states([1], variant=1))


def test_one_variant_is_read_as_ever(learnable_store: Path) -> None:
    bare = CachedFeatureDataset(learnable_store, labels=("depth",)).batch([3, 1])
    drawn = CachedFeatureDataset(learnable_store, labels=("depth",), augment_seed=1).batch([3, 1], epoch=4)
    assert torch.equal(bare.hidden_states, drawn.hidden_states)
    assert torch.equal(bare.targets["depth"], drawn.targets["depth"])


@pytest.mark.parametrize("memory", [0, 1 << 24])
def test_stacked_draws_stand_behind_each_other_on_the_timestep_axis(rich_store: Path, memory: int) -> None:
    data = augmented(
        rich_store, variant_use="stack", timesteps=[0.26, 0.001], memory=memory, labels=("depth",)
    )
    reader, schema = data.reader, data.store.manifest.schema
    for _ in range(2):
        batch = data.batch([4, 2], data.slots(2, 1), epoch=3)
        assert batch.hidden_states.shape == (2, 4, len(LAYERS), GRID, GRID, CHANNELS)
        for draw in (0, 1):
            stored = reader.hidden_states([4, 2], [0.26, 0.001], variant=draw)
            np.testing.assert_array_equal(batch.hidden_states[:, 2 * draw : 2 * draw + 2], stored)
        scores = np.concatenate(
            [reader.concept_scores("segmentation", [4, 2], [0.26, 0.001], draw) for draw in (0, 1)], axis=1
        )
        np.testing.assert_allclose(
            batch.concepts, concept_maps(scores, map_blocks(schema, "segmentation")), atol=1e-6
        )
        np.testing.assert_array_equal(batch.targets["depth"], reader.labels("depth", [4, 2]))
    swapped = augmented(rich_store, variant_use="stack", timesteps=[0.26, 0.001], variants=[1, 0])
    assert torch.equal(swapped.batch([4]).hidden_states[:, :2], data.batch([0 + 4]).hidden_states[:, 2:])


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"variants": [4]}, "variant 4 is not in .* it has 4, counted from 0"),
        ({"variants": [0, 2], "variant_use": "stack"}, "variant 2 .* is mirrored, .* choose among 0, 1"),
        ({"variants": [2], "source": "latents", "concepts": None}, "variant 2 .* is mirrored"),
        ({"variant_use": "stack", "source": "images", "concepts": None, "discriminative": []}, "noise draws"),
        ({"variant_use": "stack", "source": "discriminative"}, "noise draws, which source"),
    ],
)
def test_what_cannot_be_read_is_refused(rich_store: Path, choices: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        augmented(rich_store, **choices)


def test_a_store_of_mirror_images_alone_is_refused(tmp_path: Path) -> None:
    schema = make_rich_schema(variants=(Variant(flipped=True),))
    store = write_store(tmp_path / "store", train=2, test=1, schema=schema)
    with pytest.raises(ConfigError, match=r"every variant of .* is mirrored"):
        CachedFeatureDataset(store)


def test_latents_and_pictures_are_read_as_they_are(rich_store: Path) -> None:
    data = augmented(rich_store, source="latents", concepts=None)
    assert data.inputs.variants == (0,)
    batch = data.batch(range(8), epoch=9)
    np.testing.assert_array_equal(batch.hidden_states[:, 0, 0], data.reader.latents(range(8)))
    np.testing.assert_array_equal(batch.targets["depth"], data.reader.labels("depth", range(8)))


def test_a_map_asked_for_twice_is_read_once(rich_store: Path) -> None:
    reader = open_store(rich_store)["train"]
    repeated = [TIMESTEPS[1]] * 3
    found = reader.hidden_states([5, 5], repeated, variant=[1, 0])
    for row, variant in enumerate((1, 0)):
        for step in range(3):
            np.testing.assert_array_equal(
                found[row, step], reader.hidden_states([5], repeated[:1], variant=variant)[0, 0]
            )
