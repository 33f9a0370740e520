"""From a sample as distributed to the square that enters the backbone and the store."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmdiff_cache.config import Fit
from mmdiff_cache.datasets.pictures import MAX_PIXELS
from mmdiff_cache.errors import DataError
from mmdiff_cache.fitting import PAD, asked_size, to_network
from mmdiff_cache.records import LabelSpec, PreparedSample, Sample


def prepare(
    sample: Sample, resolution: int, prompt: str, *, fit: Fit = "squash", specs: Sequence[LabelSpec] = ()
) -> PreparedSample:
    """Fit picture and labels to `resolution` x `resolution` pixels; the original labels go along untouched.

    `specs` describe the sample's labels, whose fill values their margins hold. Pictures are filtered
    (Lanczos, with a support that grows when shrinking, so nothing aliases); labels take the nearest pixel. A
    sample that already has the size is passed through unchanged. Raises DataError for a label of another size
    than its picture, and for margins that would make more than 100 megapixels of it.
    """
    rows, columns = asked_size((sample.image.shape[0], sample.image.shape[1]), fit)
    if rows * columns > MAX_PIXELS:
        raise DataError(
            f"{sample.sample_id}: {_size(sample.image)} with margins is {rows * columns / 1e6:.0f} "
            f"megapixels, the limit is {MAX_PIXELS // 1_000_000}; scale it down first, or take another --fit"
        )
    for name, label in sample.labels.items():
        if label.shape != sample.image.shape[:2]:
            raise DataError(
                f"{sample.sample_id}: label {name!r} is {_size(label)}, its picture {_size(sample.image)}; "
                "they must have the same size"
            )
    described = {spec.name: spec for spec in specs}
    return PreparedSample(
        sample_id=sample.sample_id,
        image=resize_picture(to_network(sample.image, fit, PAD), resolution),
        prompt=prompt,
        labels={
            name: fit_label(label, described[name], resolution, fit) for name, label in sample.labels.items()
        },
        original_labels=dict(sample.labels),
        content_hash=content_hash(sample.image, sample.labels),
    )


def resize_picture(image: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    """uint8 [H W 3] -> [resolution resolution 3]."""
    if image.shape[:2] == (resolution, resolution):
        return image
    return np.asarray(Image.fromarray(image).resize((resolution, resolution), Image.Resampling.LANCZOS))


def fit_label(label: NDArray[np.generic], spec: LabelSpec, resolution: int, fit: Fit) -> NDArray[np.generic]:
    """A label map [H W] at network size, [resolution resolution]."""
    return resize_nearest(to_network(label, fit, spec.fill), resolution)


def resize_nearest(label: NDArray[np.generic], resolution: int) -> NDArray[np.generic]:
    """[H W] -> [resolution resolution], each new pixel taking the old one that lies under its centre."""
    rows, columns = (_centres(length, resolution) for length in label.shape)
    return label[rows[:, None], columns[None, :]]


def _centres(length: int, resolution: int) -> NDArray[np.int64]:
    # (2 i + 1) length / (2 resolution), rounded down, in integers: the same on every machine.
    return (2 * np.arange(resolution, dtype=np.int64) + 1) * length // (2 * resolution)


def content_hash(image: NDArray[np.uint8], labels: Mapping[str, NDArray[np.generic]]) -> str:
    """SHA-256 (hex) over name, type, shape and bytes of the picture, then of each label in name order."""
    digest = hashlib.sha256()
    for name, array in [("image", image), *sorted(labels.items())]:
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _size(array: NDArray[np.generic]) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"
