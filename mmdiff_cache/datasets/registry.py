"""Every data set by name, with the defaults that belong to it.

A new one is a file beside this one, with a `Dataset` and its `open` function, and an entry here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mmdiff_cache.datasets import concepts, duts, images, listed, nyu_depth, prompt_list, scenes, voc
from mmdiff_cache.datasets.base import Dataset
from mmdiff_cache.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetEntry:
    """One data set: how to open it, and what `extract` takes when nothing else is said."""

    name: str
    summary: str
    open: Callable[[str | None, int], Dataset]
    """Called with the folder of its files (or None) and the side of the network input in pixels; where
    pictures are drawn, with the file of prompts in place of the folder.
    """
    splits: Mapping[str, int | None]
    """Default splits with the numbers of samples that they should have; None where any number is right."""
    more_splits: Mapping[str, int] = field(default_factory=dict[str, int])
    """The same of those that are read only where they are named."""
    backbone: str
    concepts: Mapping[str, tuple[str, ...]]
    needs_root: bool
    prompt_kinds: tuple[str, ...] = ()
    """Prompts that the data set itself knows, beside the empty one."""
    resolution: int | None = None
    """Side of the network input in pixels; None takes the backbone's."""
    drawn: bool = False
    """Whether the backbone itself draws the pictures, from a file of prompts (`PromptList`)."""
    find_splits: Callable[[str | None], Mapping[str, int | None]] | None = None
    """Where the files say which splits there are."""

    def splits_in(self, data_root: str | None) -> Mapping[str, int | None]:
        """The splits of the data set in a folder; see `splits`."""
        return self.splits if self.find_splits is None else self.find_splits(data_root)


DATASETS: Mapping[str, DatasetEntry] = {
    entry.name: entry
    for entry in (
        DatasetEntry(
            name="scenes",
            summary="rendered solids on the ground: class and material masks, salient object, metric depth",
            open=scenes.open_scenes,
            splits=scenes.SIZES,
            more_splits=scenes.FINAL,
            backbone="flux-scenes",
            concepts=concepts.DEFAULT,
            needs_root=False,
            prompt_kinds=("scene", "oracle"),
        ),
        DatasetEntry(
            name="voc",
            summary="Pascal VOC 2012 with the SBD labels: 20 classes and background",
            open=voc.open_voc,
            splits=voc.SIZES,
            backbone="flux-dev",
            concepts=concepts.DEFAULT,
            needs_root=True,
        ),
        DatasetEntry(
            name="duts",
            summary="DUTS: masks of what stands out",
            open=duts.open_duts,
            splits=duts.SIZES,
            backbone="flux-dev",
            concepts=concepts.DEFAULT,
            needs_root=True,
        ),
        DatasetEntry(
            name="nyu",
            summary="NYU Depth v2, the 24,231 frames of the BTS list and the official 654",
            open=nyu_depth.open_bts,
            splits=nyu_depth.BTS_SIZES,
            backbone="flux-dev",
            concepts=concepts.DEFAULT,
            needs_root=True,
        ),
        DatasetEntry(
            name="nyu_official",
            summary="NYU Depth v2, the labelled frames in the official split, 795 and 654",
            open=nyu_depth.open_official,
            splits=nyu_depth.OFFICIAL_SIZES,
            backbone="flux-dev",
            concepts=concepts.DEFAULT,
            needs_root=True,
        ),
        DatasetEntry(
            name="nyu_1449",
            summary="NYU Depth v2, the 1,449 labelled frames cut by scene, 1,159 and 290 (the cut is ours)",
            open=nyu_depth.open_by_scene,
            splits=nyu_depth.OUR_SIZES,
            backbone="flux-dev",
            concepts=concepts.DEFAULT,
            needs_root=True,
        ),
        DatasetEntry(
            name="images",
            summary="any folder of pictures; with a list of them, prompts and labels too",
            open=images.open_folder,
            splits={listed.DEFAULT_SPLIT: None},
            find_splits=images.find_splits,
            prompt_kinds=(listed.PROMPT,),
            backbone="flux-dev",
            concepts=concepts.DEFAULT,
            needs_root=True,
        ),
        DatasetEntry(
            name="prompts",
            summary="pictures that the backbone draws from a file of prompts, captured on the way",
            open=prompt_list.open_prompt_list,
            splits={listed.DEFAULT_SPLIT: None},
            backbone="flux-dev",
            concepts=concepts.DEFAULT,
            needs_root=False,
            drawn=True,
        ),
    )
}


def find_dataset(name: str) -> DatasetEntry:
    """The entry of a data set. Raises ConfigError naming those there are."""
    if name not in DATASETS:
        raise ConfigError(f"data set {name!r} is not known; there are {', '.join(sorted(DATASETS))}")
    return DATASETS[name]
