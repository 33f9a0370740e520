"""What a prediction is, and the files it becomes: a colour picture, the raw array, one page for all."""

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmdiff_cache.inference.page import Figure, Page, Row, write_page
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.visuals.colours import label_to_colour, legend_entries

PAGE = "index.html"
PREVIEW_SIDE: Final = 1024
"""Pixels of the longer side of the input's copy that the page shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a trained run says about one picture.

    `array` [H W] has the picture's own size: int64 class ids, float32 probabilities of being salient, or
    float32 metres.
    """

    sample_id: str
    task: str
    label: LabelSpec
    image: NDArray[np.uint8]
    """[H W 3], the picture as it was read."""
    array: NDArray[Any]
    files: tuple[Path, ...] = ()
    """What was written: colour picture and raw array."""

    def picture(self) -> NDArray[np.uint8]:
        """The prediction in colour, [H W 3]: see visuals.colours for what the colours mean."""
        return label_to_colour(self.label, self.array, self.image)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the prediction in colour as a PNG file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.picture()).save(target, format="PNG")
        return target

    def __str__(self) -> str:
        written = "".join(f"\n  {file}" for file in self.files)
        return f"{self.sample_id}: {summary(self.label, self.array)}{written}"


def summary(label: LabelSpec, array: NDArray[Any]) -> str:
    """One line on a prediction: the largest classes, the salient share, or the range of metres."""
    if label.kind == "classes":
        ids, counts = np.unique(array, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return ", ".join(f"{label.classes[ids[n]]} {counts[n] / array.size:.0%}" for n in order[:4])
    if label.kind == "mask":
        return f"{(array > 0.5).mean():.0%} of the picture salient"
    near, middle, far = np.percentile(array, (1, 50, 99))
    return f"{near:.1f} to {far:.1f} m, median {middle:.1f} m"


def write_predictions(
    predictions: Sequence[Prediction], folder: Path, title: str, note: str
) -> list[Prediction]:
    """Write colour PNG and raw array of each, and a page that shows all of them; returns them with their
    files.

    Files are named by the sample's id, numbered where two would be the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    written: list[Prediction] = []
    rows: list[Row] = []
    for prediction in predictions:
        stem = _free_stem(prediction.sample_id, taken)
        picture = prediction.save(folder / f"{stem}-{prediction.task}.png")
        raw = folder / f"{stem}-{prediction.task}.npy"
        np.save(raw, prediction.array, allow_pickle=False)
        written.append(dataclasses.replace(prediction, files=(picture, raw)))
        source = Figure(file=_save_preview(prediction.image, folder / f"{stem}-input"), caption="input")
        result = Figure(
            file=picture, caption=f"{prediction.task}: {summary(prediction.label, prediction.array)}"
        )
        rows.append(Row(heading=prediction.sample_id, figures=(source, result)))
    legend = legend_entries(predictions[0].label.classes) if predictions else ()
    write_page(Page(title=title, note=note, rows=rows, legend=legend), folder / PAGE)
    return written


def _free_stem(sample_id: str, taken: set[str]) -> str:
    """A file name that holds no path, is not hidden, and is not used yet."""
    base = re.sub(r"[^\w.-]+", "_", sample_id).lstrip("._") or "picture"
    stem, number = base, 1
    while stem.casefold() in taken:
        number += 1
        stem = f"{base}-{number}"
    taken.add(stem.casefold())
    return stem


def _save_preview(image: NDArray[np.uint8], stem: Path) -> Path:
    """The input for the page: small pictures as they are, large ones scaled down to a JPEG."""
    picture = Image.fromarray(image)
    if max(picture.size) <= PREVIEW_SIDE // 2:
        path = stem.with_name(stem.name + ".png")
        picture.save(path)
        return path
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    path = stem.with_name(stem.name + ".jpg")
    picture.save(path, quality=90)
    return path
