"""A small rendered world with exact labels: pictures of solids on the ground, captions, masks, metric depth.

from mmdiff_cache.scenes import render_scene
scene = render_scene("test", 12)          # the same bytes always
scene.image, scene.class_mask, scene.depth, scene.caption
"""

from mmdiff_cache.scenes.captions import CONCEPT_WORDS, VOCABULARY
from mmdiff_cache.scenes.scene import Scene, SceneObject, render_scene
from mmdiff_cache.scenes.world import (
    CLASS_NAMES,
    COLOURS,
    GROUNDS,
    HELD_OUT_PAIRS,
    IGNORE,
    MATERIAL_NAMES,
    SHAPES,
    SPLITS,
    TEXTURES,
    TIMES,
    WORLD_VERSION,
)

__all__ = [
    "CLASS_NAMES",
    "COLOURS",
    "CONCEPT_WORDS",
    "GROUNDS",
    "HELD_OUT_PAIRS",
    "IGNORE",
    "MATERIAL_NAMES",
    "SHAPES",
    "SPLITS",
    "TEXTURES",
    "TIMES",
    "VOCABULARY",
    "WORLD_VERSION",
    "Scene",
    "SceneObject",
    "render_scene",
]
