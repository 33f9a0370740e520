"""The six solids: proportions, ray intersection and surface normals.

Each solid is convex and defined in its own frame, centred at the origin, with its axis along y:

    ball      radius r                       capsule  radius r, segment half-length h
    cylinder  radius r, half-height h        cone     base radius r at y = -h, tip at y = +h
    box       half-sides r, h, d             prism    equilateral triangle of circumradius r, half-height h

`Body` places one on the ground: turned about the vertical, upright or lying on its side.
"""

import math
from dataclasses import dataclass

import numpy as np

from mmdiff_cache.scenes.camera import F32

Point = tuple[F32, F32, F32]
Floats = F32 | float
Axes = tuple[Floats, Floats, Floats]
PRISM_FACES = ((0.0, -1.0), (math.sqrt(0.75), 0.5), (-math.sqrt(0.75), 0.5))  # outward normals (x, z)


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """One solid on the ground. Lengths in metres, rotation in radians about the vertical."""

    shape: str
    colour: str
    texture: str
    size: float  # width seen from the front
    dims: tuple[float, float, float]  # r, h, d of the solid's own frame
    x: float
    z: float
    rotation: float
    lying: bool

    @property
    def centre_height(self) -> float:
        """Height of the solid's centre above the ground."""
        r, h, _ = self.dims
        if self.shape == "ball" or (self.lying and self.shape != "prism"):
            return r
        if self.lying:
            return 0.5 * r
        return r + h if self.shape == "capsule" else h

    @property
    def extents(self) -> tuple[float, float, float]:
        """Half-sides of a box around the solid in its own frame."""
        r, h, d = self.dims
        if self.shape == "ball":
            return r, r, r
        return r, (h + r if self.shape == "capsule" else h), (d if self.shape == "box" else r)

    @property
    def footprint(self) -> float:
        """Radius of a circle on the ground that holds the solid's shadow at noon."""
        x, y, z = self.extents
        if self.lying:
            return math.hypot(x, y)
        return math.hypot(x, z) if self.shape == "box" else x

    def turn(self, x: Floats, y: Floats, z: Floats) -> Axes:
        """A direction of the camera's frame in the solid's own frame."""
        c, s = math.cos(self.rotation), math.sin(self.rotation)
        side, ahead = x * c - z * s, x * s + z * c
        return (ahead, side, y) if self.lying else (side, y, ahead)

    def turn_back(self, x: Floats, y: Floats, z: Floats) -> Axes:
        """A direction of the solid's own frame in the camera's frame."""
        c, s = math.cos(self.rotation), math.sin(self.rotation)
        ahead, side, up = (x, y, z) if self.lying else (z, x, y)
        return side * c + ahead * s, up, ahead * c - side * s

    def enter(self, x: Floats, y: Floats, z: Floats) -> Axes:
        """A point of the camera's frame (y above the ground) in the solid's own frame."""
        return self.turn(x - self.x, y - self.centre_height, z - self.z)


def intersect(body: Body, origin: Axes, ray: Axes) -> F32:
    """Ray parameter of the first hit from outside, inf for a miss; both in the solid's own frame."""
    r, h, d = body.dims
    match body.shape:
        case "ball":
            return _sphere(origin, ray, 0.0, r)
        case "cylinder":
            return _meet(_tube(origin, ray, r), _slab(origin[1], ray[1], h))
        case "capsule":
            middle = _meet(_tube(origin, ray, r), _slab(origin[1], ray[1], h))
            ends = np.minimum(_sphere(origin, ray, -h, r), _sphere(origin, ray, h, r))
            return np.minimum(middle, ends)
        case "box":
            return _meet(*(_slab(o, q, side) for o, q, side in zip(origin, ray, (r, h, d), strict=True)))
        case "prism":
            faces = (_half_space(origin, ray, face, 0.5 * r) for face in PRISM_FACES)
            return _meet(_slab(origin[1], ray[1], h), *faces)
        case _:
            return _cone(origin, ray, r, h)


def normal(body: Body, point: Point) -> Point:
    """Unit outward normal at a surface point, both in the solid's own frame."""
    x, y, z = point
    r, h, d = body.dims
    zero = np.zeros_like(x)
    match body.shape:
        case "ball":
            return x / r, y / r, z / r
        case "capsule":
            return x / r, (y - np.clip(y, -h, h)) / r, z / r
        case "cylinder":
            cap = np.abs(y) * r > np.sqrt(x * x + z * z) * h
            return np.where(cap, zero, x / r), np.where(cap, np.sign(y), zero), np.where(cap, zero, z / r)
        case "box":
            a, b, c = np.abs(x) / r, np.abs(y) / h, np.abs(z) / d
            on_x, on_y = (a >= b) & (a >= c), (b > a) & (b >= c)
            signs = np.sign(x), np.sign(y), np.sign(z)
            faces = on_x, on_y, ~(on_x | on_y)
            nx, ny, nz = (np.where(face, sign, zero) for face, sign in zip(faces, signs, strict=True))
            return nx, ny, nz
        case "prism":
            gaps = np.stack([x * nx + z * nz for nx, nz in PRISM_FACES]) - 0.5 * r
            cap = np.abs(y) - h > gaps.max(axis=0)
            face = np.asarray(PRISM_FACES, np.float32)[np.argmax(gaps, axis=0)]
            ends = np.where(cap, np.sign(y), zero)
            return np.where(cap, zero, face[:, 0]), ends, np.where(cap, zero, face[:, 1])
        case _:
            slope = math.hypot(r, 2 * h)
            radius = np.maximum(np.sqrt(x * x + z * z), np.float32(1e-6))
            side = 2 * h / slope
            return x / radius * side, np.full_like(x, r / slope), z / radius * side


def _sphere(origin: Axes, ray: Axes, height: float, r: float) -> F32:
    x, y, z = origin[0], origin[1] - height, origin[2]
    a = ray[0] * ray[0] + ray[1] * ray[1] + ray[2] * ray[2]
    b = x * ray[0] + y * ray[1] + z * ray[2]
    return _meet(_roots(a, b, x * x + y * y + z * z - r * r))


def _tube(origin: Axes, ray: Axes, r: float) -> tuple[F32, F32]:
    (x, _, z), (dx, _, dz) = origin, ray
    return _roots(dx * dx + dz * dz, x * dx + z * dz, x * x + z * z - r * r)


def _roots(a: Floats, b: Floats, c: Floats) -> tuple[F32, F32]:
    """Interval where a t^2 + 2 b t + c <= 0 for a > 0; (inf, -inf) where it is empty."""
    inside = np.asarray(b * b - a * c, np.float32)
    root = np.sqrt(np.maximum(inside, np.float32(0)))
    scale = np.float32(1) / np.maximum(a, np.float32(1e-9))
    miss = inside < 0
    near, far = (-b - root) * scale, (-b + root) * scale
    return np.where(miss, np.float32(np.inf), near), np.where(miss, np.float32(-np.inf), far)


def _slab(origin: Floats, ray: Floats, half: float) -> tuple[F32, F32]:
    inverse = np.float32(1) / _away_from_zero(ray)
    middle, reach = -origin * inverse, half * np.abs(inverse)
    return np.asarray(middle - reach, np.float32), np.asarray(middle + reach, np.float32)


def _half_space(origin: Axes, ray: Axes, face: tuple[float, float], reach: float) -> tuple[F32, F32]:
    slope = _away_from_zero(ray[0] * face[0] + ray[2] * face[1])
    t = np.asarray((reach - (origin[0] * face[0] + origin[2] * face[1])) / slope, np.float32)
    entering = slope < 0
    return np.where(entering, t, np.float32(-np.inf)), np.where(entering, np.float32(np.inf), t)


def _away_from_zero(value: Floats) -> F32:
    array = np.asarray(value, np.float32)
    return np.where(np.abs(array) < 1e-7, np.float32(1e-7), array)


def _meet(*intervals: tuple[F32, F32]) -> F32:
    """Start of the intersection of intervals, inf where it is empty or begins behind the origin."""
    near, far = intervals[0]
    for low, high in intervals[1:]:
        near, far = np.maximum(near, low), np.minimum(far, high)
    return np.where((near <= far) & (near > 0), near, np.float32(np.inf))


def _cone(origin: Axes, ray: Axes, r: float, h: float) -> F32:
    """The slanted side alone: the base lies on the ground and no ray from above reaches it first."""
    k = (r / (2 * h)) ** 2
    x, y, z = origin[0], origin[1] - h, origin[2]
    a = np.asarray(ray[0] * ray[0] + ray[2] * ray[2] - k * ray[1] * ray[1], np.float32)
    b = x * ray[0] + z * ray[2] - k * y * ray[1]
    c = x * x + z * z - k * y * y
    inside = np.asarray(b * b - a * c, np.float32)
    root = np.sqrt(np.maximum(inside, np.float32(0)))
    inverse = np.float32(1) / _away_from_zero(a)
    best = np.full(inside.shape, np.inf, np.float32)
    for t in ((-b - root) * inverse, (-b + root) * inverse):
        level = y + t * ray[1]
        good = (inside >= 0) & (t > 0) & (level <= 0) & (level >= -2 * h) & (t < best)
        best = np.where(good, t, best)
    return best
