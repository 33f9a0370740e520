"""Draws layouts: what stands where, and draws again until the scene is worth looking at.

Shapes, colours, textures, ground and time are drawn first and kept while only the placement is drawn again,
so that no rule about placement can tie a colour to a shape. Whether a scene passes is judged on a small probe
picture of fixed size: a scene is the same scene at every resolution.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.scenes.camera import CAMERA_HEIGHT, F32, FOCAL, Camera, cast_rays, grid
from mmdiff_cache.scenes.labels import salience
from mmdiff_cache.scenes.render import Layout, bounds, hit_depth, look, shade
from mmdiff_cache.scenes.shapes import Body
from mmdiff_cache.scenes.world import (
    COLOURS,
    COUNT_WEIGHTS,
    FIRST_OBJECT,
    GROUNDS,
    HELD_OUT_PAIRS,
    SHAPES,
    TEXTURE_WEIGHTS,
    TEXTURES,
    TIMES,
    choose,
    log_uniform,
    uniform,
)

PROBE = 48  # pixels along a side of the picture on which a layout is judged
PLACEMENTS = 80  # tries with the same objects before other objects are drawn
WIDTHS = (0.21, 0.56)  # of an object in the picture, in picture widths: log-uniform; a token is 1/16
DEPTHS = (2.0, 6.5)  # of an object's centre, metres: log-uniform
MIN_AREA = 0.02  # smallest visible share of the picture: about 330 of 128 x 128 pixels
MAX_HIDDEN = 0.55  # largest share of an object that may be hidden or cut off
LEAD = 1.5  # the salient object's score over the second
# Share that lies on its side; the others always stand.
LYING = {"cylinder": 0.4, "capsule": 0.4, "prism": 0.7}
FAR_SALIENT = 0.65  # share of scenes with several objects in which the salient one must not be the nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One object before it has a place."""

    shape: str
    colour: str
    texture: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """A layout that passed, with what the probe found of each body."""

    layout: Layout
    salience: tuple[float, ...]
    hidden: tuple[float, ...]  # share of the silhouette hidden by others or cut by the frame
    depth: tuple[float, ...]  # mean depth of the visible part, metres
    hides: tuple[tuple[int, ...], ...]  # numbers of the bodies that each body partly hides


def draw_scene(rng: np.random.Generator, *, hold_out: bool) -> Draw:
    """Draw until a scene passes. `hold_out` leaves out HELD_OUT_PAIRS."""
    while True:
        kinds = _draw_kinds(rng, hold_out=hold_out)
        ground, time = choose(rng, GROUNDS), choose(rng, TIMES)
        far_salient = float(rng.random()) < FAR_SALIENT
        for _ in range(PLACEMENTS):
            layout = _draw_layout(rng, kinds, ground, time)
            found = _judge(layout, far_salient=far_salient) if layout else None
            if found:
                return found


def _draw_kinds(rng: np.random.Generator, *, hold_out: bool) -> tuple[Kind, ...]:
    """One to four objects, no two of the same colour and shape."""
    count = 1 + choose(rng, (0, 1, 2, 3), COUNT_WEIGHTS)
    kinds: list[Kind] = []
    while len(kinds) < count:
        kind = Kind(
            shape=choose(rng, SHAPES),
            colour=choose(rng, COLOURS),
            texture=choose(rng, TEXTURES, TEXTURE_WEIGHTS),
        )
        taken = any((kind.colour, kind.shape) == (other.colour, other.shape) for other in kinds)
        if not taken and not (hold_out and (kind.colour, kind.shape) in HELD_OUT_PAIRS):
            kinds.append(kind)
    return tuple(kinds)


def _draw_layout(rng: np.random.Generator, kinds: tuple[Kind, ...], ground: str, time: str) -> Layout | None:
    """Camera, sun and a place for every object; None where two would stand in one another."""
    camera = Camera(
        pitch=math.radians(uniform(rng, 4, 21)),
        roll=math.radians(uniform(rng, -6, 6)),
        yaw=uniform(rng, -math.pi, math.pi),
    )
    bodies: list[Body] = []
    columns: list[float] = []
    for kind in kinds:
        column = uniform(rng, -0.06, 1.06)
        if columns and float(rng.random()) < 0.65:
            side = choose(rng, (-1.0, 1.0))
            column = choose(rng, tuple(columns)) + side * uniform(rng, 0.12, 0.32)
        columns.append(column)
        bodies.append(_place(rng, kind, camera, column))
    for number, one in enumerate(bodies):
        for other in bodies[:number]:
            if math.hypot(one.x - other.x, one.z - other.z) < one.footprint + other.footprint:
                return None
    return Layout(
        camera=camera,
        bodies=tuple(bodies),
        ground=ground,
        time_of_day=time,
        sun_height=math.radians(uniform(rng, 32, 58)),
        ground_shift=(uniform(rng, 0, 64), uniform(rng, 0, 64)),
    )


def _place(rng: np.random.Generator, kind: Kind, camera: Camera, column: float) -> Body:
    """Width in the picture log-uniform, depth log-uniform; the size in metres follows from both."""
    width, depth = log_uniform(rng, *WIDTHS), log_uniform(rng, *DEPTHS)
    size = width * depth / FOCAL
    lying = float(rng.random()) < LYING.get(kind.shape, 0.0)
    body = Body(
        shape=kind.shape,
        colour=kind.colour,
        texture=kind.texture,
        size=size,
        dims=_proportions(rng, kind.shape, size, lying),
        x=(column - 0.5) * depth / FOCAL,
        z=depth,
        rotation=uniform(rng, -0.9, 0.9) if lying else uniform(rng, -math.pi, math.pi),
        lying=lying,
    )
    drop = (CAMERA_HEIGHT - body.centre_height) * math.sin(camera.pitch)
    return replace(body, z=(depth - drop) / math.cos(camera.pitch))


def _proportions(
    rng: np.random.Generator, shape: str, size: float, lying: bool
) -> tuple[float, float, float]:
    """(r, h, d) of a solid whose width is `size`."""
    half = 0.5 * size
    match shape:
        case "ball":
            return half, half, half
        case "cylinder":
            r, h = (half * uniform(rng, 0.5, 0.7), half) if lying else (half, half * uniform(rng, 0.8, 1.4))
            return r, h, r
        case "capsule":
            r = half * uniform(rng, 0.45, 0.6) if lying else half
            return r, (half - r if lying else half * uniform(rng, 0.6, 0.9)), r
        case "box":
            return half, half * uniform(rng, 0.7, 1.3), half * uniform(rng, 0.7, 1.0)
        case "prism":
            if lying:
                return half * uniform(rng, 0.85, 1.1), half, half
            return half * 1.15, half * uniform(rng, 0.8, 1.3), half
        case _:
            return half, half * uniform(rng, 1.0, 1.4), half


def _judge(layout: Layout, *, far_salient: bool) -> Draw | None:
    """What the probe finds, or None where an object is too small or too hidden or none stands out."""
    axis = grid(PROBE, 1)
    view = look(layout, axis, axis)
    seen = [view.surface == FIRST_OBJECT + number for number in range(len(layout.bodies))]
    if any(mask.sum() < MIN_AREA * PROBE**2 for mask in seen):
        return None
    wide = grid(PROBE, 1, margin=0.8)
    rays = cast_rays(layout.camera, wide, wide)
    hidden: list[float] = []
    for body, mask in zip(layout.bodies, seen, strict=True):
        whole = int(np.isfinite(hit_depth(body, rays, bounds(layout.camera, body, wide, wide))).sum())
        hidden.append(max(0.0, 1.0 - int(mask.sum()) / max(whole, 1)))
    if max(hidden) > MAX_HIDDEN:
        return None
    colours = shade(layout, view)
    scores = tuple(salience(mask, colours) for mask in seen)
    depth = tuple(float(view.depth[mask].mean(dtype=np.float64)) for mask in seen)
    if len(scores) > 1:
        best, second = sorted(scores, reverse=True)[:2]
        nearest = scores.index(best) == depth.index(min(depth))
        if best < LEAD * second or (far_salient and nearest):
            return None
    return Draw(
        layout=layout, salience=scores, hidden=tuple(hidden), depth=depth, hides=_hides(layout, axis, seen)
    )


def _hides(layout: Layout, axis: F32, seen: list[NDArray[np.bool_]]) -> tuple[tuple[int, ...], ...]:
    """For each body the others that it hides some of."""
    rays = cast_rays(layout.camera, axis, axis)
    pairs: list[list[int]] = [[] for _ in layout.bodies]
    for back, body in enumerate(layout.bodies):
        window = bounds(layout.camera, body, axis, axis)
        whole = np.isfinite(hit_depth(body, rays, window))
        for front, mask in enumerate(seen):
            if front != back and int((mask[window] & whole).sum()) >= 6:
                pairs[front].append(back)
    return tuple(tuple(row) for row in pairs)
