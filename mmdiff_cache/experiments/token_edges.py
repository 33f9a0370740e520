"""Which tokens lie at edges and which inside, as the labels have it: fixed before anything is measured.

Ids (classes, masks): a token is at an edge if its pixels have more than one id. Depth: if the farther of two
pixels side by side in it is at least `STEP` farther than the nearer. Inside are the others of which every
pixel is known; a token with void pixels and no edge is neither, for nobody knows what the void hides.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Shaped
from numpy.typing import NDArray

from mmdiff_cache.experiments.concept_masks import known_pixels
from mmdiff_cache.records import LabelSpec

STEP = 0.2
"""Relative step of depth between two pixels side by side: the ground has less, but for its last rows."""

Tokens = Bool[np.ndarray, "n N"]
Cells = Shaped[np.ndarray, "n h w P Q"]
"""Pixels [P Q] of each token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Regions:
    """Tokens of n pictures, row by row, that lie at edges or inside; never both, perhaps neither."""

    edges: Tokens
    inside: Tokens


def token_regions(values: Shaped[np.ndarray, "n H W"], spec: LabelSpec, grid: tuple[int, int]) -> Regions:
    """The regions of labels at network size; `grid` is rows and columns of tokens, which divide the size."""
    cells, known = _cells(values, grid), _cells(known_pixels(values, spec), grid)
    edges = _has_step(cells, known) if spec.kind == "depth" else _has_several(cells, known)
    inside = known.all(axis=(3, 4)) & ~edges
    return Regions(edges=edges.reshape(len(values), -1), inside=inside.reshape(len(values), -1))


def edge_rule(spec: LabelSpec) -> str:
    """What counts as an edge, in words."""
    if spec.kind == "depth":
        return f"a step of {STEP:.0%} or more between pixels side by side ({spec.name})"
    return f"more than one {'class' if spec.kind == 'classes' else 'id'} in a token ({spec.name})"


def _cells(values: Shaped[np.ndarray, "n H W"], grid: tuple[int, int]) -> Cells:
    rows, columns = grid
    count, height, width = values.shape
    return values.reshape(count, rows, height // rows, columns, width // columns).swapaxes(2, 3)


def _has_several(cells: Cells, known: Cells) -> Bool[np.ndarray, "n h w"]:
    """Whether the known pixels of a token have more than one id."""
    ids = cells.astype(np.int64)
    lowest = np.where(known, ids, np.iinfo(np.int64).max).min(axis=(3, 4))
    highest = np.where(known, ids, -1).max(axis=(3, 4))
    return lowest < highest  # never where nothing is known


def _has_step(cells: Cells, known: Cells) -> Bool[np.ndarray, "n h w"]:
    """Whether two known pixels of a token, one beside or below the other, differ by `STEP` or more."""
    found = np.zeros(cells.shape[:3], bool)
    for one, other in ((np.s_[..., 1:, :], np.s_[..., :-1, :]), (np.s_[..., 1:], np.s_[..., :-1])):
        here, there = _metres(cells[one]), _metres(cells[other])
        steps = np.maximum(here, there) >= (1 + STEP) * np.minimum(here, there)
        found |= (steps & known[one] & known[other]).any(axis=(3, 4))
    return found


def _metres(values: NDArray[np.generic]) -> NDArray[np.float64]:
    return values.astype(np.float64)
