"""The main job on rendered scenes: extract with the bundled flux-scenes, then train one head a task.

    mmdiff-cache extract --config pipelines/scenes.py      # stage one: 2,750 scenes, once
    mmdiff-cache train --config pipelines/scenes.py        # stage two: depth; for another task
    mmdiff-cache train --config pipelines/scenes.py --task segmentation

Beside the paper: layers {4, 15, 26, 37} of FLUX.1-dev's 38 single blocks become those at the same relative
depths of the bundled model, the four timesteps are the paper's own (Sec. 3.1), and the concept sets are the
best rows of Tab. 11 to 13. Prompts are empty: a caption would name what the heads have to find. Scores stand
in docs/experiments.md.
"""

from mmdiff_cache.config import ExtractConfig, NoiseConfig, TrainConfig

BACKBONE = "flux-scenes"
TIMESTEPS = (0.78, 0.52, 0.26, 0.001)
LAYERS = ("single.1", "single.4", "single.8", "single.11")
CONCEPTS = {
    "segmentation": ("object", "background", "detail", "edges"),
    "saliency": ("background", "object", "edges", "salient", "contour"),
    "depth": ("depth", "surface", "object", "near", "far"),
    "unified": (
        "object", "background", "detail", "edges", "salient", "contour", "depth", "surface", "near", "far",
    ),
}  # fmt: skip


def extract() -> ExtractConfig:
    """Stage one. Half an hour on one free core; `--limit 256` is enough for a first look."""
    return ExtractConfig(
        dataset="scenes",
        splits=("train", "val", "test"),
        backbone=BACKBONE,
        prompts="empty",
        layers=LAYERS,
        timesteps=TIMESTEPS,
        concepts=CONCEPTS,
        noise=NoiseConfig(form="flow", seed=0),
    )


def train() -> TrainConfig:
    """Stage two. The task chooses decoder, loss and concepts; the only store with its labels is taken."""
    return TrainConfig(task="depth", layers=LAYERS, timesteps=TIMESTEPS, seed=0)
