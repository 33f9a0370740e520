"""How numbers are taken, in words: every evaluation prints it beside them. See docs/protocols.md."""

from dataclasses import dataclass

from mmdiff_cache.loader import CachedFeatureDataset
from mmdiff_cache.tasks import Task

FLIPPED = "outputs averaged with those of the mirrored picture (the run's alone, not the baselines')"
_ALIGNED = {
    "none": "no alignment",
    "median": "each sample's prediction scaled by the ratio of the medians (--align median)",
    "lstsq": "each sample's prediction given the scale and shift of least squares (--align lstsq)",
}
_SIZES = {
    "squash": "outputs resized to the labels' original size first",
    "pad": "outputs resized to the labels' original size first, margins taken off",
    "crop": "the middle square that the network saw, outputs resized to its original size first",
}


ORACLE = "oracle"
"""Prompts that name the objects."""


def features_in_words(backbone: str, prompts: str) -> str:
    """What every table of scores says of the features."""
    bound = " (the prompts name the objects: an upper bound)" if prompts == ORACLE else ""
    return f"features of {backbone}, prompts {prompts}{bound}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """What of a run is scored, and how."""

    split: str
    weights: str
    align: str = "none"
    flip: bool = False

    @property
    def name(self) -> str:
        """A part of file names that no other way has."""
        options = ("" if self.align == "none" else f"-{self.align}") + ("-flip" if self.flip else "")
        return f"{self.split}-{self.weights}{options}"


def in_words(dataset: CachedFeatureDataset, task: Task, way: Way) -> str:
    """The protocol of an evaluation."""
    label = dataset.reader.label_specs[task.label]
    missing = len(dataset.reader) - len(dataset)
    left_out = f" ({missing} left out that failed or have no label)" if missing else ""
    void = "" if label.ignore is None else f", id {label.ignore} not counted"
    align, span = _ALIGNED[way.align], label.valid_range
    how = {
        "classes": f"IoU from one confusion matrix over all samples{void}, its mean over the classes that "
        "the labels show",
        "mask": "8-bit predictions stretched to 0..1 a sample; S-measure, maximum F of the mean curve over "
        "256 thresholds and MAE by pysodmetrics",
        "depth": f"each sample's errors, then their mean; depths in {span} m, predictions clamped to it, "
        f"{align}",
    }[label.kind]
    if label.crop is not None:
        top, bottom, left, right = label.crop
        how += f"; rows {top} to {bottom} and columns {left} to {right} of the original"
    twice = f"{FLIPPED}; " if way.flip else ""
    return (
        f"{len(dataset)} samples of {way.split}{left_out}; {twice}{_SIZES[dataset.store.manifest.fit]}; {how}"
    )
