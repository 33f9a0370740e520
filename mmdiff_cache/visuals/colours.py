"""Arrays to colours: depth, classes, salience, concept maps. Every function returns uint8 RGB [H W 3].

Colours mean the same in every picture: near is bright, far is dark; a class keeps its colour whatever else is
in the picture; hatching marks what no label owns and no metric counts.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Num, UInt8
from numpy.typing import NDArray

from mmdiff_cache.records import LabelSpec

RGB = NDArray[np.uint8]

# Anchors of a ramp whose lightness rises evenly: dark indigo, blue, teal, green, yellow.
_RAMP: Final = np.array(
    [
        (24, 15, 62),
        (59, 46, 126),
        (52, 98, 150),
        (38, 146, 144),
        (92, 190, 104),
        (187, 221, 63),
        (253, 243, 139),
    ],
    dtype=np.float64,
)
# The first colours are told apart in common colour blindness too; later ones come from the golden angle.
_CLASS_COLOURS: Final = (
    (160, 200, 232),
    (186, 164, 128),
    (213, 62, 54),
    (46, 110, 190),
    (245, 190, 40),
    (40, 150, 104),
    (140, 86, 176),
    (240, 130, 60),
    (92, 200, 214),
    (226, 122, 174),
)
_VOID_LIGHT, _VOID_DARK = np.uint8(236), np.uint8(196)
_GOLDEN_ANGLE: Final = 0.381966


def ramp(values: Float[NDArray[np.floating], "H W"]) -> UInt8[RGB, "H W 3"]:
    """Colour values in [0, 1] from dark (0) to bright (1); values outside are clamped."""
    position = np.clip(np.nan_to_num(values), 0.0, 1.0) * (len(_RAMP) - 1)
    low = np.minimum(position.astype(np.intp), len(_RAMP) - 2)
    share = (position - low)[..., None]
    return np.rint(_RAMP[low] * (1 - share) + _RAMP[low + 1] * share).astype(np.uint8)


def class_colours(count: int) -> UInt8[RGB, "count 3"]:
    """The colours of the class ids 0 ... count - 1."""
    later = (
        _from_hue(index * _GOLDEN_ANGLE % 1.0, 0.75 if index % 2 else 0.55)
        for index in range(len(_CLASS_COLOURS), count)
    )
    return np.array([*_CLASS_COLOURS[:count], *later], dtype=np.uint8).reshape(-1, 3)


def voc_palette() -> UInt8[RGB, "256 3"]:
    """The palette of Pascal VOC's label files: the bits of an id, three at a time, from the highest down."""
    bits = np.arange(256)[:, None] >> np.arange(8)[None, :] & 1
    palette = np.zeros((256, 3), np.int64)
    for bit in range(8):
        palette[:, bit % 3] |= bits[:, bit] << 7 - bit // 3
    return palette.astype(np.uint8)


def _from_hue(hue: float, value: float) -> tuple[int, int, int]:
    """One saturated colour; hue and value in [0, 1]."""
    phase = np.array([hue, hue + 2 / 3, hue + 1 / 3]) % 1.0 * 6.0
    channels = np.clip(np.abs(phase - 3.0) - 1.0, 0.0, 1.0)
    red, green, blue = np.rint(255 * value * (0.3 + 0.7 * channels)).astype(int).tolist()
    return red, green, blue


def classes_to_colour(
    ids: Num[NDArray[np.integer], "H W"], count: int, ignore: int | None = None
) -> UInt8[RGB, "H W 3"]:
    """Colour class ids 0 ... count - 1; the id `ignore` is hatched."""
    void = np.zeros(ids.shape, bool) if ignore is None else ids == ignore
    picture = class_colours(count)[np.where(void, 0, ids)]
    return _hatch(picture, void)


def depth_to_colour(
    metres: Float[NDArray[np.floating], "H W"], near: float, far: float
) -> UInt8[RGB, "H W 3"]:
    """Colour a depth map in metres by its logarithm: `near` is bright, `far` dark; invalid (<= 0) is hatched.

    Two maps with the same `near` and `far` can be compared by eye.
    """
    valid = np.isfinite(metres) & (metres > 0)
    safe = np.where(valid, metres, far)
    closeness = (np.log(far) - np.log(safe)) / max(np.log(far) - np.log(near), 1e-6)
    return _hatch(ramp(closeness.astype(np.float64)), ~valid)


def depth_range(*maps: NDArray[np.floating]) -> tuple[float, float]:
    """Metres from the 1st to the 99th percentile of all valid values, for a shared colour scale."""
    values = np.concatenate([m[np.isfinite(m) & (m > 0)].ravel() for m in maps])
    if values.size == 0:
        return 1.0, 10.0
    near, far = np.percentile(values, (1, 99))
    return float(near), float(max(far, near * 1.05))


def salience_to_colour(
    probability: Float[NDArray[np.floating], "H W"], image: UInt8[RGB, "H W 3"]
) -> UInt8[RGB, "H W 3"]:
    """The picture with all that is not salient faded to pale grey; probability in [0, 1] at the picture's
    size.
    """
    grey = image.mean(axis=-1, keepdims=True) * 0.35 + 255 * 0.55
    weight = np.clip(np.nan_to_num(probability), 0.0, 1.0)[..., None]
    return np.rint(image * weight + grey * (1 - weight)).astype(np.uint8)


def label_to_colour(
    label: LabelSpec, array: NDArray[Any], image: RGB, span: tuple[float, float] | None = None
) -> RGB:
    """A prediction or a label map in colour; `span` = (near, far) in metres fixes the scale of depth."""
    if label.kind == "classes":
        return classes_to_colour(array, len(label.classes), label.ignore)
    if label.kind == "mask":
        known = array if label.ignore is None else np.where(array == label.ignore, 0, array)
        return salience_to_colour(known.astype(np.float64), image)
    return depth_to_colour(array, *(span or depth_range(array)))


def heat_over(
    image: UInt8[RGB, "H W 3"], heat: Float[NDArray[np.floating], "h w"], strength: float = 0.65
) -> UInt8[RGB, "H W 3"]:
    """A concept map, stretched to its own range, as colour over the greyed picture."""
    low, high = float(heat.min()), float(heat.max())
    stretched = (heat - low) / max(high - low, 1e-12)
    rows = np.arange(image.shape[0]) * heat.shape[0] // image.shape[0]
    columns = np.arange(image.shape[1]) * heat.shape[1] // image.shape[1]
    coloured = ramp(stretched[np.ix_(rows, columns)].astype(np.float64))
    grey = np.repeat(image.mean(axis=-1, keepdims=True), 3, axis=-1)
    return np.rint(coloured * strength + grey * (1 - strength)).astype(np.uint8)


def enlarge(picture: UInt8[RGB, "H W 3"], side: int) -> RGB:
    """Repeat pixels until the longer side has about `side` pixels: sharp edges show what the model really
    gives.
    """
    factor = max(1, round(side / max(picture.shape[:2])))
    return np.repeat(np.repeat(picture, factor, axis=0), factor, axis=1)


def legend_entries(names: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
    """Class names with their colours, for a panel's legend."""
    return [
        (name, (int(r), int(g), int(b)))
        for name, (r, g, b) in zip(names, class_colours(len(names)), strict=True)
    ]


def _hatch(picture: RGB, where: NDArray[np.bool_]) -> RGB:
    rows, columns = np.indices(where.shape)
    stripes = ((rows + columns) // 2 % 2)[..., None]
    hatched = np.where(stripes == 0, _VOID_LIGHT, _VOID_DARK)
    return np.where(where[..., None], hatched, picture).astype(np.uint8)
