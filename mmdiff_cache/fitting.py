"""How a picture of any size becomes the square that the network takes, and how a map comes back from it.

`squash` scales each side on its own; nothing is cut off or added. `pad` first adds margins to the shorter
side, `crop` first cuts the longer one, both evenly (an odd pixel at the bottom or right), so that scaling
keeps the shape of things.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import Fit

PAD = 128
"""Grey of the margins, the middle of the network's input range."""


def asked_size(size: tuple[int, int], fit: Fit) -> tuple[int, int]:
    """Rows and columns of what the network saw of a picture of this size, before it was scaled."""
    if fit == "squash":
        return size
    side = max(size) if fit == "pad" else min(size)
    return side, side


def to_network(array: NDArray[Any], fit: Fit, fill: float) -> NDArray[Any]:
    """Pad or cut a picture or label map [H W ...] to what the network sees; margins hold `fill`."""
    rows, columns = asked_size((array.shape[0], array.shape[1]), fit)
    if fit == "pad":
        missing = (rows - array.shape[0], columns - array.shape[1])
        margins = [(room // 2, room - room // 2) for room in missing]
        return np.pad(array, [*margins, *[(0, 0)] * (array.ndim - 2)], constant_values=fill)
    top, left = (array.shape[0] - rows) // 2, (array.shape[1] - columns) // 2
    return array[top : top + rows, left : left + columns]


def from_network(array: NDArray[Any], size: tuple[int, int], fit: Fit) -> NDArray[Any]:
    """Take the margins off a map [H W] of what the network saw of a picture of this size.

    With `crop` the map stays what it is: of what was cut off nothing is known.
    """
    if fit != "pad":
        return array
    top, left = (array.shape[0] - size[0]) // 2, (array.shape[1] - size[1]) // 2
    return array[top : top + size[0], left : left + size[1]]


def onto(array: NDArray[Any], size: tuple[int, int], fill: float) -> NDArray[Any]:
    """Lay the middle of a picture, all that `crop` leaves of it, onto one of the full size = (H, W)."""
    if array.shape == size:
        return array
    whole = np.full(size, fill, array.dtype)
    top, left = (size[0] - array.shape[0]) // 2, (size[1] - array.shape[1]) // 2
    whole[top : top + array.shape[0], left : left + array.shape[1]] = array
    return whole
