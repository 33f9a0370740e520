"""Rays against closed forms, and normals against the surface they stand on."""

import math

import numpy as np
import pytest

from mmdiff_cache.scenes.camera import CAMERA_HEIGHT, FAR, Camera, cast_rays, grid, project
from mmdiff_cache.scenes.render import Layout, bounds, hit_depth, look, shade
from mmdiff_cache.scenes.shapes import Body, intersect, normal
from mmdiff_cache.scenes.world import SHAPES

LEVEL = Camera(pitch=0.2, roll=0.1, yaw=0.7)


def body(shape: str, *, lying: bool = False) -> Body:
    return Body(
        shape=shape,
        colour="red",
        texture="plain",
        size=1.0,
        dims=(0.5, 0.6, 0.4),
        x=0.2,
        z=3.5,
        rotation=0.5,
        lying=lying,
    )


def layout(*bodies: Body) -> Layout:
    return Layout(
        camera=LEVEL, bodies=bodies, ground="sand", time_of_day="day", sun_height=0.8, ground_shift=(0.0, 0.0)
    )


def test_ground_depth_is_the_closed_form() -> None:
    axis = grid(32, 1)
    view = look(layout(), axis, axis)
    right, up, forward = LEVEL.axes
    for row, column in [(31, 0), (20, 15), (25, 31)]:
        across, along = (float(axis[column]) - 0.5) / 0.866, (0.5 - float(axis[row])) / 0.866
        fall = -(forward[1] + across * right[1] + along * up[1])
        assert view.depth[row, column] == pytest.approx(CAMERA_HEIGHT / fall, rel=1e-5)
    assert view.depth[np.isfinite(view.depth)].max() <= FAR
    assert np.array_equal(np.isfinite(view.depth), view.surface == 1)


def test_ball_depth_is_the_closed_form() -> None:
    ball = body("ball")
    axis = grid(64, 1)
    rays = cast_rays(LEVEL, axis, axis)
    depth = hit_depth(ball, rays, (slice(None), slice(None)))
    d = np.stack([rays.x, rays.y, rays.z], -1).astype(np.float64)
    centre = np.array([0.2, 0.5 - CAMERA_HEIGHT, 3.5])
    b, a = d @ centre, (d * d).sum(-1)
    inside = b * b - a * (centre @ centre - 0.25)
    expected = np.where(inside >= 0, (b - np.sqrt(np.maximum(inside, 0))) / a, np.inf)
    clear = np.abs(inside) > 1e-4
    assert np.isfinite(expected).sum() > 100
    np.testing.assert_allclose(depth[clear], expected[clear], rtol=1e-4)


def on_surface(shape: str, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Signed gap to the surface of the solid with dims (0.5, 0.6, 0.4), in its own frame; 0 on it."""
    radial = np.hypot(x, z)
    if shape == "ball":
        return np.sqrt(x * x + y * y + z * z) - 0.5
    if shape == "capsule":
        return np.hypot(radial, y - np.clip(y, -0.6, 0.6)) - 0.5
    if shape == "cylinder":
        return np.maximum(radial - 0.5, np.abs(y) - 0.6)
    if shape == "box":
        return np.max([np.abs(x) - 0.5, np.abs(y) - 0.6, np.abs(z) - 0.4], axis=0)
    if shape == "cone":
        return radial - 0.5 * (0.6 - y) / 1.2
    side = math.sqrt(0.75)
    faces = [-z, side * x + 0.5 * z, -side * x + 0.5 * z]
    return np.max([*(face - 0.25 for face in faces), np.abs(y) - 0.6], axis=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_hits_lie_on_the_surface_and_normals_face_the_ray(shape: str) -> None:
    rng = np.random.default_rng(3)
    start = np.array([1.5, 2.0, -2.5])
    target = rng.uniform(-0.45, 0.45, (400, 3))
    ray = (target - start).astype(np.float32)
    solid = body(shape)
    t = intersect(solid, (1.5, 2.0, -2.5), (ray[:, 0], ray[:, 1], ray[:, 2]))
    hit = np.isfinite(t)
    assert hit.sum() > 150
    x, y, z = (start[i] + t[hit] * ray[hit, i] for i in range(3))
    assert np.abs(on_surface(shape, x, y, z)).max() < 1e-4
    n = np.stack(normal(solid, tuple(axis.astype(np.float32) for axis in (x, y, z))), -1)
    np.testing.assert_allclose((n * n).sum(-1), 1, atol=2e-3)
    assert ((n * ray[hit]).sum(-1) < 1e-3).all()


@pytest.mark.parametrize(
    ("shape", "lying"),
    [*((shape, False) for shape in SHAPES), ("cylinder", True), ("capsule", True), ("prism", True)],
)
def test_the_projected_window_holds_every_hit(shape: str, lying: bool) -> None:
    solid = body(shape, lying=lying)
    axis = grid(96, 1)
    rays = cast_rays(LEVEL, axis, axis)
    whole = np.isfinite(hit_depth(solid, rays, (slice(None), slice(None))))
    window = np.zeros_like(whole)
    window[bounds(LEVEL, solid, axis, axis)] = True
    assert whole.sum() > 100
    assert not (whole & ~window).any()


@pytest.mark.parametrize("shape", ["cylinder", "capsule", "prism"])
def test_a_lying_solid_rests_on_the_ground(shape: str) -> None:
    solid = body(shape, lying=True)
    down = np.linspace(-0.4, 0.4, 9, dtype=np.float32)
    ray = solid.turn(np.zeros(9), np.ones(9), np.zeros(9))
    t = intersect(solid, solid.enter(0.2 + 0 * down, -1.0 + 0 * down, 3.5 + 0 * down), ray)
    np.testing.assert_allclose(t, 1.0, atol=1e-5)


def test_pixels_are_single_precision() -> None:
    axis = grid(16, 3)
    for shape in SHAPES:
        world = layout(body(shape))
        view = look(world, axis, axis)
        assert view.depth.dtype == np.float32
        colours = shade(world, view)
        assert colours.dtype == np.float32
        assert np.isfinite(colours).all()


def test_a_body_casts_its_shadow_away_from_the_sun() -> None:
    axis = grid(64, 1)
    lone, world = layout(), layout(body("cylinder"))
    view = look(world, axis, axis)
    darker = (shade(lone, look(lone, axis, axis)) - shade(world, view)).sum(-1) > 0.15
    shadow = darker & (view.surface == 1)
    assert shadow.sum() > 20
    x = (view.rays.x * view.depth)[shadow].mean() - 0.2
    z = (view.rays.z * view.depth)[shadow].mean() - 3.5
    assert x * world.sun[0] + z * world.sun[2] < 0


def test_turning_back_undoes_turning() -> None:
    for lying in (False, True):
        solid = body("prism", lying=lying)
        assert solid.turn_back(*solid.turn(0.3, -0.2, 0.9)) == pytest.approx((0.3, -0.2, 0.9))


def test_project_agrees_with_the_rays() -> None:
    axis = grid(8, 1)
    rays = cast_rays(LEVEL, axis, axis)
    point = (2 * float(rays.x[5, 2]), CAMERA_HEIGHT + 2 * float(rays.y[5, 2]), 2 * float(rays.z[5, 2]))
    assert project(LEVEL, point) == pytest.approx((float(axis[2]), float(axis[5]), 2.0), abs=1e-5)
