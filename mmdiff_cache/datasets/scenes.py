"""The rendered world as a data set: nothing on disk, every sample drawn when it is asked for."""

from collections.abc import Sequence

from mmdiff_cache import scenes
from mmdiff_cache.datasets.base import Dataset
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.records import LabelSpec, Sample
from mmdiff_cache.scenes.camera import FAR

SIZES = {"train": 2000, "val": 250, "test": 500}
FINAL = {"final": 500}
"""Scenes that nothing was chosen on: the small world's tables are scored on them (docs/experiments.md)."""
LABELS = (
    LabelSpec(name="segmentation", kind="classes", classes=scenes.CLASS_NAMES, ignore=scenes.IGNORE),
    LabelSpec(name="material", kind="classes", classes=scenes.MATERIAL_NAMES, ignore=scenes.IGNORE),
    LabelSpec(name="saliency", kind="mask", ignore=scenes.IGNORE),
    LabelSpec(name="depth", kind="depth", valid_range=(0.1, FAR)),
)


class RenderedScenes(Dataset):
    """Scenes at one size in pixels; the same scene at every size."""

    label_specs = LABELS

    def __init__(self, size: int) -> None:
        self.size = size
        self.canvas = (size, size)

    def sample_ids(self, split: str) -> Sequence[str]:
        sizes = {**SIZES, **FINAL}
        if split not in sizes:
            raise ConfigError(f"split {split!r} is not one of scenes: {', '.join(sizes)}")
        return [f"scenes-{split}-{index:06d}" for index in range(sizes[split])]

    def load(self, split: str, index: int) -> Sample:
        scene = scenes.render_scene(split, index, self.size)
        return Sample(
            sample_id=scene.sample_id,
            image=scene.image,
            prompts={"scene": scene.prompt_scene, "oracle": scene.caption},
            labels={
                "segmentation": scene.class_mask,
                "material": scene.material_mask,
                "saliency": scene.salient_mask,
                "depth": scene.depth,
            },
        )


def open_scenes(data_root: str | None, resolution: int) -> RenderedScenes:
    """Scenes at the size in which they enter the backbone. Raises ConfigError for a root: it has no files."""
    if data_root is not None:
        raise ConfigError(
            f"data set 'scenes' is rendered and has no files; leave out --data-root {data_root}"
        )
    return RenderedScenes(resolution)
