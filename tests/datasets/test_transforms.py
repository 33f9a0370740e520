"""From a sample to the stored square: picture filtered, labels from the nearest pixel, originals kept."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff_cache.config import Fit
from mmdiff_cache.datasets.transforms import prepare, resize_nearest, resize_picture
from mmdiff_cache.errors import DataError
from mmdiff_cache.fitting import PAD, asked_size, from_network, to_network
from mmdiff_cache.records import LabelSpec, Sample

SPECS = (
    LabelSpec(name="classes", kind="classes", classes=("a", "b", "c", "d"), ignore=255),
    LabelSpec(name="depth", kind="depth", valid_range=(0.0, 1.0)),
)
SIZES = st.tuples(st.integers(1, 60), st.integers(1, 60))


def sample(height: int, width: int, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    return Sample(
        sample_id="one",
        image=rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        labels={
            "classes": rng.choice(np.array([0, 3, 255], np.uint8), (height, width)),
            "depth": rng.random((height, width), dtype=np.float32),
        },
    )


def test_a_sample_of_the_right_size_is_passed_through() -> None:
    given_sample = sample(32, 32)
    prepared = prepare(given_sample, 32, "a ball", specs=SPECS)
    assert prepared.prompt == "a ball"
    np.testing.assert_array_equal(prepared.image, given_sample.image)
    for name, label in given_sample.labels.items():
        np.testing.assert_array_equal(prepared.labels[name], label)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.integers(0, 5))
def test_labels_keep_their_values_and_type_and_the_original_stays(
    h: int, w: int, resolution: int, seed: int
) -> None:
    given_sample = sample(h, w, seed)
    prepared = prepare(given_sample, resolution, "", specs=SPECS)
    assert prepared.image.shape == (resolution, resolution, 3)
    for name, label in given_sample.labels.items():
        assert prepared.labels[name].shape == (resolution, resolution)
        assert prepared.labels[name].dtype == label.dtype
        assert np.isin(prepared.labels[name], label).all()
        np.testing.assert_array_equal(prepared.original_labels[name], label)


def test_nearest_is_centred_so_flipping_commutes() -> None:
    label = np.arange(7 * 13, dtype=np.uint8).reshape(7, 13)
    np.testing.assert_array_equal(resize_nearest(label[:, ::-1], 5), resize_nearest(label, 5)[:, ::-1])
    np.testing.assert_array_equal(resize_nearest(np.array([[1, 2]], np.uint8), 4)[0], [1, 1, 2, 2])


def test_picture_and_label_stay_aligned() -> None:
    """An edge in the picture and the same edge in the label end up within a pixel of each other."""
    mask = np.zeros((90, 150), np.uint8)
    mask[:, 47:] = 1
    picture = np.repeat(mask[..., None] * 255, 3, axis=2)
    small, label = resize_picture(picture, 32)[:, :, 0] > 127, resize_nearest(mask, 32) == 1
    assert np.abs(small.sum(axis=1).astype(int) - label.sum(axis=1).astype(int)).max() <= 1


def test_shrinking_does_not_alias() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize_picture(stripes, 16).astype(int) - 127).max() < 12


def test_the_content_hash_sees_every_part_and_nothing_else() -> None:
    base = sample(5, 6)
    hashed = prepare(base, 8, "a", specs=SPECS).content_hash
    assert prepare(base, 16, "b", specs=SPECS).content_hash == hashed
    assert prepare(replace(base, sample_id="two"), 8, "a", specs=SPECS).content_hash == hashed
    image = base.image.copy()
    image[0, 0, 0] ^= 1
    assert prepare(replace(base, image=image), 8, "a", specs=SPECS).content_hash != hashed
    labels = {**base.labels, "depth": base.labels["depth"] + np.float32(1)}
    assert prepare(replace(base, labels=labels), 8, "a", specs=SPECS).content_hash != hashed
    assert prepare(replace(base, labels={}), 8, "a", specs=SPECS).content_hash != hashed


def test_a_label_of_another_size_is_refused_by_name() -> None:
    broken = replace(sample(5, 6), labels={"depth": np.zeros((6, 5), np.float32)})
    with pytest.raises(DataError, match=r"one: label 'depth' is 5 x 6, its picture 6 x 5"):
        prepare(broken, 8, "", specs=SPECS)


def test_margins_beyond_what_a_picture_may_have_are_refused() -> None:
    """Ten rows of 60,000 pixels are 600 kilopixels; as a square they would fill the memory."""
    long = Sample(sample_id="long", image=np.zeros((10, 60_000, 3), np.uint8))
    with pytest.raises(DataError, match="60000 x 10 with margins is 3600 megapixels, the limit is 100"):
        prepare(long, 64, "", fit="pad")
    fits: tuple[Fit, ...] = ("squash", "crop")
    for fit in fits:
        assert prepare(long, 64, "", fit=fit).image.shape == (64, 64, 3)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from(("pad", "crop")))
def test_pad_and_crop_give_squares_that_keep_shapes_and_come_back(size: tuple[int, int], fit: Fit) -> None:
    array = np.random.default_rng(0).integers(0, 99, (*size, 3), dtype=np.uint8)
    square = to_network(array, fit, 200)
    assert square.shape[:2] == asked_size(size, fit)
    assert square.shape[0] == square.shape[1] == (max if fit == "pad" else min)(size)
    if fit == "pad":
        np.testing.assert_array_equal(from_network(square, size, fit), array)
        assert (square == 200).all(axis=2).sum() == square.shape[0] ** 2 - size[0] * size[1], "only margins"
    else:
        assert from_network(square, size, fit) is square
        top, left = (size[0] - len(square)) // 2, (size[1] - len(square)) // 2
        np.testing.assert_array_equal(square, array[top : top + len(square), left : left + len(square)])


def test_margins_are_grey_in_the_picture_and_not_counted_in_labels() -> None:
    wide = sample(10, 40)
    ready = prepare(wide, 40, "", fit="pad", specs=SPECS)
    margins = np.r_[0:15, 25:40]
    assert (ready.image[margins] == PAD).all()
    assert (ready.labels["classes"][margins] == 255).all()
    assert np.isnan(ready.labels["depth"][margins]).all()
    np.testing.assert_array_equal(ready.labels["classes"][15:25], wide.labels["classes"])
    np.testing.assert_array_equal(ready.original_labels["depth"], wide.labels["depth"])


def test_crop_takes_the_middle() -> None:
    wide = sample(10, 40)
    ready = prepare(wide, 10, "", fit="crop", specs=SPECS)
    np.testing.assert_array_equal(ready.image, wide.image[:, 15:25])
    np.testing.assert_array_equal(ready.labels["depth"], wide.labels["depth"][:, 15:25])
