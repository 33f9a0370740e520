"""Colours mean the same in every picture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmdiff_cache.visuals import colours


def luminance(picture: np.ndarray) -> np.ndarray:
    return picture @ np.array([0.2126, 0.7152, 0.0722])


def test_the_ramp_gets_steadily_brighter() -> None:
    steps = luminance(colours.ramp(np.linspace(0, 1, 101)[None]))[0]
    assert np.all(np.diff(steps) > 0)


@given(st.integers(2, 60))
def test_every_class_has_its_own_colour_whatever_the_number_of_classes(count: int) -> None:
    found = colours.class_colours(count)
    assert len({tuple(c) for c in found.tolist()}) == count
    assert np.array_equal(found[:2], colours.class_colours(2))


def test_near_is_brighter_than_far_and_invalid_is_neither() -> None:
    picture = colours.depth_to_colour(np.array([[2.0, 8.0, 30.0, 0.0, np.nan]]), near=2.0, far=30.0)
    near, middle, far = luminance(picture)[0, :3]
    assert near > middle > far
    assert all(len(set(pixel)) == 1 for pixel in picture[0, 3:].tolist()), "invalid depth is hatched in grey"


def test_the_depth_range_ignores_invalid_values() -> None:
    near, far = colours.depth_range(np.array([[0.0, np.nan, 3.0, 4.0, 5.0]]))
    assert 3.0 <= near < far <= 5.0
    assert colours.depth_range(np.zeros((2, 2))) == (1.0, 10.0)


def test_void_pixels_are_hatched_and_others_keep_their_class_colour() -> None:
    ids = np.array([[0, 1, 255, 255, 255, 255]], dtype=np.uint8)
    picture = colours.classes_to_colour(ids, 3, ignore=255)
    assert np.array_equal(picture[0, :2], colours.class_colours(3)[:2])
    assert len({tuple(p) for p in picture[0, 2:].tolist()}) == 2


def test_a_fully_salient_pixel_is_the_picture_itself() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    assert np.array_equal(colours.salience_to_colour(np.ones((4, 4)), image), image)


@pytest.mark.parametrize("heat", [np.zeros((2, 2)), np.eye(2), np.arange(6.0).reshape(2, 3)])
def test_heat_keeps_the_size_of_the_picture(heat: np.ndarray) -> None:
    image = np.full((8, 12, 3), 128, np.uint8)
    assert colours.heat_over(image, heat).shape == image.shape


def test_enlarging_repeats_pixels() -> None:
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large = colours.enlarge(picture, 8)
    assert large.shape == (8, 8, 3)
    assert np.array_equal(large[::4, ::4], picture)
