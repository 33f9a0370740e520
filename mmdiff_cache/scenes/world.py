"""The closed world: what can stand in a scene, the label ids, the splits and their random streams."""

import hashlib
from typing import TypeVar

import numpy as np

from mmdiff_cache.errors import ConfigError

T = TypeVar("T")

WORLD_VERSION = 1
SPLITS = ("train", "val", "test", "final", "pretrain", "judge")

SHAPES = ("ball", "cylinder", "capsule", "box", "prism", "cone")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURES = ("plain", "striped", "checked", "speckled")
GROUNDS = ("sand", "grass", "snow", "stone")
TIMES = ("day", "dusk", "night")

IGNORE = 255
SKY, GROUND = 0, 1
FIRST_OBJECT = 2
CLASS_NAMES = ("sky", "ground", *SHAPES)
MATERIAL_NAMES = ("sky", "ground", *TEXTURES)

# (colour, shape) pairs that the split `pretrain` never shows: 4 of 48. Every other split may show them.
HELD_OUT_PAIRS = (("red", "cone"), ("blue", "capsule"), ("green", "box"), ("yellow", "cylinder"))

TEXTURE_WEIGHTS = (0.34, 0.22, 0.22, 0.22)
COUNT_WEIGHTS = (0.38, 0.34, 0.18, 0.10)  # one, two, three, four objects


def check_address(split: str, index: int, size: int) -> None:
    """Refuse an unknown split, a negative index or a picture too small to label, with ConfigError."""
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is not one of the scenes' splits: {', '.join(SPLITS)}")
    if index < 0:
        raise ConfigError(f"a scene's index must be 0 or more, not {index}; numbering starts at 0")
    if size < 16:
        raise ConfigError(f"a scene's size must be at least 16 pixels, not {size}; the usual one is 128")


def stream(split: str, index: int, purpose: str) -> np.random.Generator:
    """Random stream of one scene and one purpose ('layout', 'caption', 'noise').

    The Philox key is a hash of (world version, split, index, purpose): two splits cannot share a scene, a
    scene does not depend on the others, and rewording a caption cannot move an object.
    """
    text = f"scenes/{WORLD_VERSION}/{split}/{index}/{purpose}"
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """One draw, uniform in [low, high)."""
    return low + (high - low) * float(rng.random())


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """One draw whose logarithm is uniform in [log low, log high)."""
    return low * (high / low) ** float(rng.random())


def choose(rng: np.random.Generator, items: tuple[T, ...], weights: tuple[float, ...] | None = None) -> T:
    """One of the items, uniformly or by weights that add up to 1."""
    point = float(rng.random())
    if weights is None:
        return items[int(point * len(items))]
    for item, weight in zip(items, weights, strict=True):
        point -= weight
        if point < 0:
            return item
    return items[-1]
