"""What a concept's word names in a picture, as a mask made from the labels: fixed before anything is scored.

A word that names nothing a label shows (detail, surface, depth, scene) has no mask.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Shaped
from numpy.typing import NDArray

from mmdiff_cache.records import LabelKind, LabelSpec

STUFF = ("background", "sky", "ground")
"""Classes that are no objects."""
AROUND = frozenset({*STUFF, "far"})
"""Words for what surrounds the middle of a picture rather than stands in it."""

Labels = Shaped[np.ndarray, "B H W"]
Masks = Bool[np.ndarray, "B H W"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedMask:
    """The part of a label set that a word names."""

    word: str
    label: str
    """Name of the label set."""
    part: str

    def __str__(self) -> str:
        return f"{self.part} ({self.label})"


def named_mask(word: str, labels: Mapping[str, LabelSpec]) -> NamedMask | None:
    """The mask of a word in the first label set that has it; None where there is none."""
    for kind, part in WORDS.get(word, ()):
        for name, spec in labels.items():
            if spec.kind == kind:
                return NamedMask(word=word, label=name, part=part)
    for name, spec in labels.items():
        if word in spec.classes:
            return NamedMask(word=word, label=name, part=word)
    return None


def masks_of(named: NamedMask, values: Labels, spec: LabelSpec) -> tuple[Masks, Masks]:
    """Pixels inside the mask, and pixels outside of it; what the label does not know is in neither."""
    known = known_pixels(values, spec)
    make = _PARTS.get((spec.kind, named.part))
    inside = values == spec.classes.index(named.part) if make is None else make(values, spec, known)
    return inside & known, ~inside & known


def known_pixels(values: Labels, spec: LabelSpec) -> Masks:
    """Pixels that the label knows: no ignored id, no depth out of range."""
    if spec.kind == "depth":
        low, high = spec.valid_range or (0.0, np.inf)
        return (values > low) & (values < high)
    return np.ones(values.shape, bool) if spec.ignore is None else values != spec.ignore


def _things(values: Labels, spec: LabelSpec, known: Masks) -> Masks:
    return ~_rest(values, spec, known)


def _rest(values: Labels, spec: LabelSpec, known: Masks) -> Masks:
    return np.isin(values, [number for number, name in enumerate(spec.classes) if name in STUFF])


def _inside(values: Labels, spec: LabelSpec, known: Masks) -> Masks:
    return values == 1


def _outside(values: Labels, spec: LabelSpec, known: Masks) -> Masks:
    return values == 0


def _boundary(values: Labels, spec: LabelSpec, known: Masks) -> Masks:
    """Pixels beside one of another id, above, below, left or right; both must be known."""
    found = np.zeros(values.shape, bool)
    for axis in (1, 2):
        here, there = (_cut(values, axis, first) for first in (0, 1))
        odd = (here != there) & _cut(known, axis, 0) & _cut(known, axis, 1)
        for first in (0, 1):
            _cut(found, axis, first)[...] |= odd
    return found


def _cut(values: NDArray[np.generic], axis: int, first: int) -> NDArray[np.generic]:
    """All rows (axis 1) or columns (axis 2) but the last or the first."""
    size = values.shape[axis] - 1
    return values[:, first : first + size] if axis == 1 else values[:, :, first : first + size]


def _near(values: Labels, spec: LabelSpec, known: Masks) -> Masks:
    return values < _middle(values, known)


def _far(values: Labels, spec: LabelSpec, known: Masks) -> Masks:
    return values >= _middle(values, known)


def _middle(values: Labels, known: Masks) -> NDArray[np.float64]:
    """The median of each picture's known depths, [B 1 1]; NaN where none is known."""
    medians = [
        np.median(one[here]) if here.any() else np.nan for one, here in zip(values, known, strict=True)
    ]
    return np.array(medians, np.float64)[:, None, None]


Part = Callable[[Labels, LabelSpec, Masks], Masks]
_PARTS: Mapping[tuple[LabelKind, str], Part] = {
    ("classes", "objects"): _things,
    ("classes", "all but objects"): _rest,
    ("classes", "class boundaries"): _boundary,
    ("mask", "salient object"): _inside,
    ("mask", "all but the salient object"): _outside,
    ("mask", "its outline"): _boundary,
    ("depth", "nearer half"): _near,
    ("depth", "farther half"): _far,
}
Parts = tuple[tuple[LabelKind, str], ...]
_OBJECTS: Parts = (("classes", "objects"), ("mask", "salient object"))
_OUTLINES: Parts = (("classes", "class boundaries"), ("mask", "its outline"))
WORDS: Mapping[str, Parts] = {
    "object": _OBJECTS,
    "foreground": _OBJECTS,
    "background": (("classes", "all but objects"), ("mask", "all but the salient object")),
    "salient": (("mask", "salient object"),),
    "edges": _OUTLINES,
    "contour": _OUTLINES[::-1],
    "near": (("depth", "nearer half"),),
    "far": (("depth", "farther half"),),
}
"""Kinds of label sets and their parts, the first that a store has; names of classes name themselves."""
