"""Colours, light and the procedural textures of objects, ground and sky. Colours are display RGB in 0..1."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.scenes.camera import F32, Vector
from mmdiff_cache.scenes.shapes import Body, Point

PALETTE: dict[str, Vector] = {
    "red": (0.86, 0.10, 0.10),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (0.97, 0.88, 0.14),
    "green": (0.08, 0.62, 0.16),
    "cyan": (0.15, 0.82, 0.85),
    "blue": (0.12, 0.26, 0.88),
    "purple": (0.50, 0.14, 0.70),
    "pink": (0.98, 0.52, 0.74),
}
GROUND_PALETTE: dict[str, Vector] = {
    "sand": (0.84, 0.72, 0.50),
    "grass": (0.42, 0.52, 0.24),
    "snow": (0.90, 0.92, 0.96),
    "stone": (0.52, 0.51, 0.52),
}
DARK = 0.48  # brightness of the dark part of a texture


@dataclass(frozen=True, kw_only=True, slots=True)
class Light:
    """Light and sky of one time of day."""

    ambient: Vector
    sun: Vector
    horizon: Vector
    zenith: Vector


LIGHTS: dict[str, Light] = {
    "day": Light(
        ambient=(0.67, 0.69, 0.71),
        sun=(0.44, 0.42, 0.38),
        horizon=(0.82, 0.90, 0.96),
        zenith=(0.34, 0.58, 0.90),
    ),
    "dusk": Light(
        ambient=(0.68, 0.62, 0.63),
        sun=(0.46, 0.36, 0.26),
        horizon=(0.98, 0.64, 0.40),
        zenith=(0.42, 0.32, 0.54),
    ),
    "night": Light(
        ambient=(0.52, 0.54, 0.62),
        sun=(0.28, 0.30, 0.35),
        horizon=(0.17, 0.21, 0.36),
        zenith=(0.04, 0.05, 0.14),
    ),
}

_SIDE = 64
_LATTICE: F32 = np.random.Generator(np.random.Philox(key=20)).random((_SIDE, _SIDE), dtype=np.float32)
_FLAT: F32 = _LATTICE.ravel()


def object_brightness(body: Body, point: Point) -> F32 | float:
    """Factor on the base colour at a point of the solid's own frame. The pattern scales with the object."""
    x, y, z = (axis * np.float32(1 / body.size) for axis in point)
    match body.texture:
        case "striped":
            dark = np.floor(y * 4.4 + 0.25) % 2 > 0.5
        case "checked":
            cells = np.floor(x * 3.4 + 0.25) + np.floor(y * 3.4 + 0.25) + np.floor(z * 3.4 + 0.25)
            dark = cells % 2 > 0.5
        case "speckled":
            x, y, z = x * 3.6, y * 3.6, z * 3.6
            dark = _dots(x, y, z) | _dots(x + 0.5, y + 0.5, z + 0.5)
        case _:
            return 1.0
    return np.where(dark, np.float32(DARK), np.float32(1.0))


def ground_brightness(ground: str, x: F32, z: F32, depth: F32) -> F32:
    """Factor on the ground's colour at world coordinates in metres; the pattern fades with depth."""
    match ground:
        case "sand":
            wave = x * 1.3 + 1.6 * _noise(x * 0.45, z * 0.45)
            pattern = 0.22 * np.abs(wave - np.floor(wave) - 0.5) + 0.10 * _noise(x * 5, z * 5) - 0.105
        case "grass":
            pattern = 0.30 * _noise(x * 2.1, z * 2.1) + 0.34 * _noise(x * 9, z * 9) - 0.32
        case "snow":
            pattern = 0.16 * _noise(x * 0.9, z * 0.9) - 0.08
        case _:
            cell_x, cell_z = np.floor(x), np.floor(z)
            tone = _LATTICE[_wrap(cell_x), _wrap(cell_z)]
            edge = np.minimum(0.5 - np.abs(x - cell_x - 0.5), 0.5 - np.abs(z - cell_z - 0.5))
            pattern = np.where(edge < 0.035, np.float32(-0.22), 0.16 * tone - 0.08)
    return 1.0 + pattern / (1.0 + depth * depth * np.float32(1 / 144))


def sky_colour(light: Light, rise: F32) -> tuple[F32, F32, F32]:
    """Colour of the sky where a unit ray rises by `rise` (0 at the horizon)."""
    mix = np.clip(rise * 2.2, 0, 1)
    mix = mix * (2 - mix)
    ends = zip(light.horizon, light.zenith, strict=True)
    red, green, blue = (low + (high - low) * mix for low, high in ends)
    return red, green, blue


def _noise(x: F32, z: F32) -> F32:
    """Smooth value noise in 0..1 with cells of unit size."""
    cell_x, cell_z = np.floor(x), np.floor(z)
    fx, fz = x - cell_x, z - cell_z
    fx, fz = fx * fx * (3 - 2 * fx), fz * fz * (3 - 2 * fz)
    i, k = _wrap(cell_x), _wrap(cell_z)
    row, next_row = i * _SIDE, ((i + 1) & (_SIDE - 1)) * _SIDE
    next_k = (k + 1) & (_SIDE - 1)
    corner = _FLAT.take(row + k)
    near = corner + fx * (_FLAT.take(next_row + k) - corner)
    corner = _FLAT.take(row + next_k)
    far = corner + fx * (_FLAT.take(next_row + next_k) - corner)
    return near + fz * (far - near)


def _wrap(cell: F32) -> NDArray[np.int32]:
    return cell.astype(np.int32) & (_SIDE - 1)


def _dots(x: F32, y: F32, z: F32) -> NDArray[np.bool_]:
    """Inside one of the dots scattered over space, at most one in each unit cell."""
    cells = np.floor(x), np.floor(y), np.floor(z)
    i, j, k = (_wrap(cell) for cell in cells)
    square = np.zeros_like(x)
    for axis, (value, cell) in enumerate(zip((x, y, z), cells, strict=True)):
        shift = _LATTICE[(i + 17 * axis) & 63, (j * 5 + k * 13 + 7 * axis) & 63]
        gap = value - cell - (0.35 + 0.3 * shift)
        square = square + gap * gap
    return square < 0.08
