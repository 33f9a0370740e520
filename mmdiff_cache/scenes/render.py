"""The ray-caster: which surface each sample point sees, how deep, and in what colour.

Only sums, products, quotients and square roots touch the pixels: they round alike on every machine. Sines and
powers are taken of a few double-precision scalars alone.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.scenes.camera import CAMERA_HEIGHT, F32, FAR, Camera, Rays, Vector, cast_rays, project
from mmdiff_cache.scenes.shapes import Body, intersect, normal
from mmdiff_cache.scenes.textures import (
    GROUND_PALETTE,
    LIGHTS,
    PALETTE,
    ground_brightness,
    object_brightness,
    sky_colour,
)
from mmdiff_cache.scenes.world import FIRST_OBJECT, GROUND, SKY

HAZE = 26.0  # metres at which the ground is half lost in the haze


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Everything that the picture depends on, noise aside. Sun angles in radians, of the world before yaw."""

    camera: Camera
    bodies: tuple[Body, ...]
    ground: str
    time_of_day: str
    sun_height: float
    ground_shift: tuple[float, float]

    @property
    def sun(self) -> Vector:
        """Unit vector towards the sun or moon in the camera's frame."""
        flat = math.cos(self.sun_height)
        return flat * math.sin(self.camera.yaw), math.sin(self.sun_height), flat * math.cos(self.camera.yaw)


@dataclass(frozen=True, slots=True)
class View:
    """What a grid of points sees: surface 0 sky, 1 ground, 2 + i body i; depth in metres (inf for sky)."""

    rays: Rays
    surface: NDArray[np.int8]
    depth: F32


def look(layout: Layout, u: F32, v: F32) -> View:
    """Cast one ray through every point of the grid."""
    rays = cast_rays(layout.camera, u, v)
    with np.errstate(divide="ignore", over="ignore"):
        depth = np.where(rays.y < 0, CAMERA_HEIGHT / -rays.y, np.float32(np.inf))
    depth[depth > FAR] = np.inf
    surface = np.where(np.isfinite(depth), np.int8(GROUND), np.int8(SKY))
    for number, body in enumerate(layout.bodies):
        window = bounds(layout.camera, body, u, v)
        hit = hit_depth(body, rays, window)
        closer = hit < depth[window]
        depth[window][closer] = hit[closer]
        surface[window][closer] = FIRST_OBJECT + number
    return View(rays, surface, depth)


def hit_depth(body: Body, rays: Rays, window: tuple[slice, slice]) -> F32:
    """Depth of the body alone along the rays of a window, inf where they miss it."""
    origin = body.enter(0.0, CAMERA_HEIGHT, 0.0)
    return intersect(body, origin, body.turn(rays.x[window], rays.y[window], rays.z[window]))


def bounds(camera: Camera, body: Body, u: F32, v: F32) -> tuple[slice, slice]:
    """Rows and columns of the grid that can see the body: the projection of a box around it."""
    corners: list[tuple[float, float, float]] = []
    for signs in range(8):
        x, y, z = (half if signs >> axis & 1 else -half for axis, half in enumerate(body.extents))
        px, py, pz = (float(value) for value in body.turn_back(x, y, z))
        corners.append(project(camera, (px + body.x, py + body.centre_height, pz + body.z)))
    if min(depth for *_, depth in corners) < 0.05:
        return slice(0, len(v)), slice(0, len(u))
    columns, rows = [c[0] for c in corners], [c[1] for c in corners]
    return _span(v, min(rows), max(rows)), _span(u, min(columns), max(columns))


def _span(axis: F32, low: float, high: float) -> slice:
    start, stop = np.searchsorted(axis, np.asarray((low, high), np.float32))
    return slice(max(int(start) - 1, 0), int(stop) + 1)


def shade(layout: Layout, view: View) -> F32:
    """Colours [V U 3] of a view, 0..1."""
    flat = View(
        Rays(view.rays.x.ravel(), view.rays.y.ravel(), view.rays.z.ravel()),
        view.surface.ravel(),
        view.depth.ravel(),
    )
    planes = np.empty((3, flat.surface.size), np.float32)
    _shade_sky(layout, flat, planes)
    _shade_ground(layout, flat, planes)
    for number in range(len(layout.bodies)):
        _shade_body(layout, flat, number, planes)
    return np.clip(planes, 0, 1).reshape(3, *view.surface.shape).transpose(1, 2, 0)


def _shade_sky(layout: Layout, view: View, planes: F32) -> None:
    at = np.flatnonzero(view.surface == SKY)
    x, y, z = view.rays.x[at], view.rays.y[at], view.rays.z[at]
    rise = y / np.sqrt(x * x + y * y + z * z)
    for plane, colour in zip(planes, sky_colour(LIGHTS[layout.time_of_day], rise), strict=True):
        plane[at] = colour


def _shade_ground(layout: Layout, view: View, planes: F32) -> None:
    at = np.flatnonzero(view.surface == GROUND)
    depth = view.depth[at]
    x, z = view.rays.x[at] * depth, view.rays.z[at] * depth
    c, s = math.cos(layout.camera.yaw), math.sin(layout.camera.yaw)
    east, north = x * c - z * s + layout.ground_shift[0], x * s + z * c + layout.ground_shift[1]
    pattern = ground_brightness(layout.ground, east, north, depth)
    lit = layout.sun[1] * _sunlit(layout, x, np.zeros_like(x), z, skip=-1)
    light = LIGHTS[layout.time_of_day]
    haze = depth * depth / (depth * depth + HAZE * HAZE)
    base = GROUND_PALETTE[layout.ground]
    for channel, plane in enumerate(planes):
        colour = base[channel] * pattern * (light.ambient[channel] + light.sun[channel] * lit)
        plane[at] = colour + haze * (light.horizon[channel] - colour)


def _shade_body(layout: Layout, view: View, number: int, planes: F32) -> None:
    body = layout.bodies[number]
    at = np.flatnonzero(view.surface == FIRST_OBJECT + number)
    depth = view.depth[at]
    x, z = view.rays.x[at] * depth, view.rays.z[at] * depth
    y = view.rays.y[at] * depth + np.float32(CAMERA_HEIGHT)
    local = tuple(np.asarray(axis, np.float32) for axis in body.enter(x, y, z))
    point = (local[0], local[1], local[2])
    nx, ny, nz = body.turn_back(*normal(body, point))
    sx, sy, sz = layout.sun
    facing = nx * sx + ny * sy + nz * sz
    lit = np.maximum(facing, np.float32(0)) * _sunlit(layout, x, y, z, skip=number)
    light, base = LIGHTS[layout.time_of_day], PALETTE[body.colour]
    pattern = object_brightness(body, point)
    # The bright half of the sky lights faces that the sun does not reach, so that edges show in the shade.
    shelter = 0.90 + 0.10 * ny + 0.17 * facing
    for channel, plane in enumerate(planes):
        plane[at] = base[channel] * pattern * (light.ambient[channel] * shelter + light.sun[channel] * lit)


def _sunlit(layout: Layout, x: F32, y: F32, z: F32, *, skip: int) -> F32:
    """1 where the sun reaches a point, 0 in a cast shadow. Convex solids need no shadow on themselves."""
    sun = layout.sun
    lit = np.ones(x.shape, np.float32)
    for number, body in enumerate(layout.bodies):
        if number == skip:
            continue
        dx, dy, dz = body.x - x, body.centre_height - y, body.z - z
        along = dx * sun[0] + dy * sun[1] + dz * sun[2]
        reach = sum(half * half for half in body.extents)
        close = np.flatnonzero((along > 0) & (dx * dx + dy * dy + dz * dz - along * along < reach))
        if close.size:
            origin = body.enter(x[close], y[close], z[close])
            lit[close[np.isfinite(intersect(body, origin, body.turn(*sun)))]] = 0
    return lit
