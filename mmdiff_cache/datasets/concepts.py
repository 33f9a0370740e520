"""Concept vocabularies by name: the sets that the paper compares, and some of ours.

A vocabulary cannot be cut afterwards, since its words see each other; so a set that is to be compared has to
be extracted as it is. Paper: App. E, Tab. 11-13.
"""

from collections.abc import Mapping

SEGMENTATION = ("object", "background", "detail", "edges")
SALIENCY = ("background", "object", "edges", "salient", "contour")
DEPTH = ("depth", "surface", "object", "near", "far")
UNIFIED = tuple(dict.fromkeys((*SEGMENTATION, *SALIENCY, *DEPTH)))
GROUPS = ("living", "vehicle", "furniture")
VOC_WORDS = (
    "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "table", "dog",
    "horse", "motorbike", "person", "plant", "sheep", "sofa", "train", "television",
)  # fmt: skip
SCENES_WORDS = ("ball", "cylinder", "capsule", "box", "prism", "cone")
UNTRAINED = ("virtue", "syntax", "tuesday", "rumour", "algebra")
"""Words that name nothing in a picture, and that no caption of flux-scenes had: its encoder spells them."""

DEFAULT: Mapping[str, tuple[str, ...]] = {
    "segmentation": SEGMENTATION,
    "saliency": SALIENCY,
    "depth": DEPTH,
    "unified": UNIFIED,
}
"""The best row of each table, for the task of its name, and all their words together."""

PRESETS: Mapping[str, tuple[str, ...]] = {
    **DEFAULT,
    "voc-groups": (*GROUPS, "object", "background"),
    "voc-structure-groups": ("object", "background", *GROUPS, "detail", "edges"),
    "voc-structure-classes": (*SEGMENTATION, *VOC_WORDS),
    "voc-everything": (*GROUPS, *SEGMENTATION, *VOC_WORDS),
    "duts-scene": ("object", "foreground", "background", "scene"),
    "nyu-surface": ("depth", "surface", "object", "background"),
    "nyu-indoor": ("wall", "floor", "furniture", "object", "depth"),
    "nyu-distance": ("near", "far", "depth", "distance", "surface"),
    "scenes-structure-classes": (*SEGMENTATION, *SCENES_WORDS),
    "scenes-classes": ("sky", "ground", *SCENES_WORDS),
    **{f"untrained-{count}": UNTRAINED[:count] for count in (4, 5)},
}
"""By the name that `--concepts NAME` takes."""
