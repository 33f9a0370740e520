"""Pixel labels out of the subsamples: class, material, metric depth, salient object and salience score."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.scenes.camera import F32
from mmdiff_cache.scenes.shapes import Body
from mmdiff_cache.scenes.world import FIRST_OBJECT, IGNORE, SHAPES, SKY, TEXTURES

U8 = NDArray[np.uint8]
SUBSAMPLES = 3  # along each side of a pixel
PRIOR_WIDTH = 0.2  # in picture widths: how far from the middle an object counts half
OWNED = 0.6  # share of a pixel's subsamples that a class needs, else the pixel is void


@dataclass(frozen=True, slots=True)
class Labels:
    """Label maps [H W]; depth in metres, 0 where invalid; salient 0/1; IGNORE where nothing owns a pixel."""

    class_mask: U8
    material_mask: U8
    depth: F32
    salient_mask: U8
    instance_mask: U8  # 0 where no object has the most subsamples, i + 1 on body i
    visible_pixels: tuple[int, ...]  # a body each: its pixels in instance_mask


def label(surface: NDArray[np.int8], depth: F32, bodies: tuple[Body, ...], salient: int) -> Labels:
    """Labels of a picture from its subsamples [3H 3W]; `salient` is the number of the salient body."""
    blocks, depths = _blocks(surface), _blocks(depth)
    inside = np.stack([blocks == number for number in range(FIRST_OBJECT + len(bodies))])
    counts = inside.sum(axis=1, dtype=np.uint8)
    classes = [0, 1, *(FIRST_OBJECT + SHAPES.index(body.shape) for body in bodies)]
    materials = [0, 1, *(FIRST_OBJECT + TEXTURES.index(body.texture) for body in bodies)]
    class_mask = _majority(counts, classes)
    owner = _owner(counts, classes, class_mask)
    mine = (blocks == owner) & (blocks != SKY)
    total = np.where(mine, depths, np.float32(0)).sum(axis=0, dtype=np.float32)
    mean = total / np.maximum(mine.sum(axis=0, dtype=np.float32), 1)
    is_salient = [int(number == FIRST_OBJECT + salient) for number in range(len(classes))]
    return Labels(
        class_mask=class_mask,
        material_mask=_majority(counts, materials),
        depth=np.where(owner == SKY, np.float32(0), mean).astype(np.float32),
        salient_mask=_majority(counts, is_salient),
        instance_mask=np.where(owner >= FIRST_OBJECT, owner - (FIRST_OBJECT - 1), 0).astype(np.uint8),
        visible_pixels=tuple(int((owner == FIRST_OBJECT + number).sum()) for number in range(len(bodies))),
    )


def average(colours: F32) -> F32:
    """Mean colour [H W 3] over the subsamples [3H 3W 3] of each pixel."""
    total = np.zeros((colours.shape[0] // SUBSAMPLES, colours.shape[1] // SUBSAMPLES, 3), np.float32)
    for row in range(SUBSAMPLES):
        for column in range(SUBSAMPLES):
            total += colours[row::SUBSAMPLES, column::SUBSAMPLES]
    return total * np.float32(1 / SUBSAMPLES**2)


def salience(seen: NDArray[np.bool_], colours: F32) -> float:
    """Score of one object: share of the picture x contrast with a frame around it x nearness to the middle.

    `seen` [H W] is where the object is visible; contrast is the distance of mean colours, 0..sqrt(3); the
    prior is 1 in the middle of the picture and 1/2 at a distance of PRIOR_WIDTH.
    """
    size = seen.shape[0]
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    if not rows.size:
        return 0.0
    band = max(2, size // 12)
    window = (
        slice(max(int(rows[0]) - band, 0), int(rows[-1]) + band + 1),
        slice(max(int(columns[0]) - band, 0), int(columns[-1]) + band + 1),
    )
    mask = seen[window].astype(np.float64)
    share = float(mask.sum())
    pixels = colours[window].astype(np.float64)
    own = (pixels * mask[..., None]).sum(axis=(0, 1)) / share
    around = (pixels * (1 - mask)[..., None]).sum(axis=(0, 1)) / max(float((1 - mask).sum()), 1.0)
    contrast = float(np.sqrt(((own - around) ** 2).sum()))
    at_rows, at_columns = np.nonzero(seen)
    off_v = (float(at_rows.mean()) + 0.5) / size - 0.5
    off_u = (float(at_columns.mean()) + 0.5) / size - 0.5
    prior = 1.0 / (1.0 + (off_u * off_u + off_v * off_v) / PRIOR_WIDTH**2)
    return share / size**2 * contrast * prior


def _blocks(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Subsamples [9 H W] of each pixel."""
    k = SUBSAMPLES
    return np.stack([values[row::k, column::k] for row in range(k) for column in range(k)])


def _majority(counts: U8, groups: list[int]) -> U8:
    """The group that owns each pixel, IGNORE where none has enough subsamples. counts [surface H W]."""
    need = OWNED * SUBSAMPLES**2
    result = np.full(counts.shape[1:], IGNORE, np.uint8)
    for group in set(groups):
        result[_sum(counts, groups, group) >= need] = group
    return result


def _sum(counts: U8, groups: list[int], group: int) -> U8:
    members = [number for number, other in enumerate(groups) if other == group]
    return counts[members].sum(axis=0, dtype=np.uint8)


def _owner(counts: U8, classes: list[int], class_mask: U8) -> NDArray[np.int8]:
    """The surface with the most subsamples, of the owning class if there is one; ties avoid the sky."""
    score = counts.astype(np.int16) * 2
    score[1:] += 1
    for number, kind in enumerate(classes):
        score[number] += np.where(class_mask == kind, np.int16(100), np.int16(0))
    return np.argmax(score, axis=0).astype(np.int8)
