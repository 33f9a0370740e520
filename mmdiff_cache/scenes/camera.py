"""A pinhole camera at a fixed height above the ground.

Frame, in metres: x to the right, y up, z forward along the ground; the camera is at (0, CAMERA_HEIGHT, 0).
Picture coordinates: u to the right and v down, both 0..1 inside the (square) frame, and beyond it outside.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# float32 in fact: numpy's stubs call float32 x float a float64, although the result stays float32.
F32 = NDArray[np.floating[Any]]
Vector = tuple[float, float, float]

CAMERA_HEIGHT = 1.5  # metres; fixed, so that metric depth can be read off one picture
FOCAL = 0.866  # focal length in picture widths: a field of view of 60 degrees
FAR = 40.0  # metres; the ground ends here and the sky begins


@dataclass(frozen=True, kw_only=True, slots=True)
class Camera:
    """Where it looks. Angles in radians; pitch > 0 looks down; yaw turns ground and sun, not the layout."""

    pitch: float
    roll: float
    yaw: float

    @property
    def axes(self) -> tuple[Vector, Vector, Vector]:
        """Unit vectors (right, up, forward) of the picture."""
        sp, cp = math.sin(self.pitch), math.cos(self.pitch)
        sr, cr = math.sin(self.roll), math.cos(self.roll)
        return (cr, sr * cp, sr * sp), (-sr, cr * cp, cr * sp), (0.0, -sp, cp)


@dataclass(frozen=True, slots=True)
class Rays:
    """Ray directions, scaled so that the ray parameter is metric depth along the optical axis."""

    x: F32
    y: F32
    z: F32


def grid(size: int, per_pixel: int, margin: float = 0.0) -> F32:
    """Picture coordinates of the sample points along one side; margin widens the frame at both ends."""
    step = 1.0 / (size * per_pixel)
    extra = round(margin * size * per_pixel)
    return ((np.arange(-extra, size * per_pixel + extra) + 0.5) * step).astype(np.float32)


def cast_rays(camera: Camera, u: F32, v: F32) -> Rays:
    """Rays through every (v, u) of a grid, arrays [V U]."""
    right, up, forward = camera.axes
    across = ((u - 0.5) / FOCAL)[None, :]
    along = ((0.5 - v) / FOCAL)[:, None]
    x, y, z = (across * right[i] + (along * up[i] + forward[i]) for i in range(3))
    return Rays(x, y, z)


def project(camera: Camera, point: Vector) -> tuple[float, float, float]:
    """(u, v, depth) of a point; u and v mean something only where depth > 0."""
    right, up, forward = camera.axes
    x, y, z = point[0], point[1] - CAMERA_HEIGHT, point[2]
    depth = x * forward[0] + y * forward[1] + z * forward[2]
    scale = FOCAL / max(depth, 1e-6)
    u = 0.5 + scale * (x * right[0] + y * right[1] + z * right[2])
    v = 0.5 - scale * (x * up[0] + y * up[1] + z * up[2])
    return u, v, depth
