"""Predictions of a split as files that other tools read: one PNG a sample at its label's original size.

DIR/
    predictions.json    what the files are, of which run, and the file of each sample id
    2007_000033.png     class ids in VOC's palette; salience x 255; or millimetres in 16 bits
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.fitting import from_network, onto
from mmdiff_cache.loader import Batch, CachedFeatureDataset
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.training.checkpoint import partial_name, refusal, write_bytes, write_json
from mmdiff_cache.training.scoring import Predictor
from mmdiff_cache.visuals.colours import voc_palette

RECORD: Final = "predictions.json"
MILLIMETRES: Final = 1000
OPTION: Final = "--export"
LONGEST: Final = 100
"""Characters of a file's name before it is cut and numbered by its hash."""
_FORMATS: Final = {
    "classes": "8-bit palette PNG of class ids",
    "mask": "8-bit grey PNG, probability x 255",
    "depth": "16-bit grey PNG, millimetres as the model says them: neither aligned nor clamped to the range",
}
_UNSEEN: Final = {"classes": 255, "mask": 0, "depth": 0}
"""Pixel values of what the network did not see: void, not salient, and no depth."""


class Export:
    """Writes what a predictor says of every sample of a data set, as it is scored.

    `what` says what is exported; a folder that holds an export of the same goes on to hold it, file by file.
    `protocol` is how it is scored.

    Raises ConfigError for a folder that holds anything else, StorageError when the file system refuses.
    """

    def __init__(
        self,
        folder: Path,
        dataset: CachedFeatureDataset,
        label: LabelSpec,
        what: Mapping[str, Any],
        protocol: str,
    ) -> None:
        if label.kind == "classes" and len(label.classes) > _UNSEEN["classes"]:
            raise ConfigError(
                f"export writes at most {_UNSEEN['classes']} classes, label set {label.name!r} has "
                f"{len(label.classes)}; leave export out"
            )
        self._folder, self._dataset, self._label = folder, dataset, label
        self._files = file_names([dataset.reader.ids[sample] for sample in dataset.indices])
        self._about = {**what, "protocol": protocol}
        _claim(folder, what)
        self._note(complete=False)

    def watching(self, predict: Predictor) -> Predictor:
        """The same predictor, with what it says written down."""

        def watched(batch: Batch, sizes: Sequence[tuple[int, int]]) -> Sequence[NDArray[Any]]:
            guesses = predict(batch, sizes)
            for sample, sample_id, guess in zip(batch.indices.tolist(), batch.ids, guesses, strict=True):
                self._write(sample, sample_id, guess)
            return guesses

        return watched

    def finish(self) -> None:
        """Note that every file is there."""
        self._note(complete=True)

    def _write(self, sample: int, sample_id: str, guess: NDArray[Any]) -> None:
        kind, fit = self._label.kind, self._dataset.store.manifest.fit
        rows, columns = self._dataset.reader.original_label(self._label.name, sample).shape
        values = pixel_values(from_network(guess, (rows, columns), fit), self._label)
        picture = Image.fromarray(onto(values, (rows, columns), _UNSEEN[kind]))
        if kind == "classes":
            picture.putpalette(voc_palette().tobytes())
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        write_bytes(self._folder / self._files[sample_id], buffer.getvalue(), OPTION)

    def _note(self, *, complete: bool) -> None:
        about = {"format": _FORMATS[self._label.kind], "unseen": _UNSEEN[self._label.kind]}
        classes = {"classes": list(self._label.classes)} if self._label.classes else {}
        write_json(
            self._folder / RECORD,
            {**self._about, **about, **classes, "complete": complete, "files": self._files},
            OPTION,
        )


def pixel_values(guess: NDArray[Any], label: LabelSpec) -> NDArray[Any]:
    """A prediction as the whole numbers of its PNG: ids, 0 to 255, or 1 to 65535 mm (0 is no number)."""
    if label.kind == "classes":
        return guess.astype(np.uint8)
    if label.kind == "mask":
        return np.round(guess * 255).astype(np.uint8)
    most = np.iinfo(np.uint16).max
    known = np.nan_to_num(guess.astype(np.float64), nan=0.0, posinf=most, neginf=0.0)
    millimetres = np.clip(np.rint(known * MILLIMETRES), 1, most)
    return np.where(np.isnan(guess), 0, millimetres).astype(np.uint16)


def file_names(ids: Sequence[str]) -> dict[str, str]:
    """A file name for each sample id, by the id: without folders, and different whatever the file system.

    An id that is no plain file name, or differs from another one only in what a file system may not tell
    apart, gets the hash of the id behind what is left of it.
    """
    plain = {one: re.sub(r"[^A-Za-z0-9_.-]+", "_", one).lstrip("._-")[:LONGEST] for one in ids}
    often = Counter(stem.casefold() for stem in plain.values())
    return {
        one: f"{stem if stem == one and often[stem.casefold()] == 1 else f'{stem}~{_hashed(one)}'}.png"
        for one, stem in plain.items()
    }


def _hashed(sample_id: str) -> str:
    return hashlib.sha256(sample_id.encode()).hexdigest()[:16]


def _claim(folder: Path, what: Mapping[str, Any]) -> None:
    """Make a folder, or find that it is empty or holds an export of the same."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = {entry.name for entry in folder.iterdir()} - {partial_name(RECORD)}
    except FileExistsError:
        raise ConfigError(f"{folder} is a file; an export is a folder: choose another {OPTION}") from None
    except OSError as error:
        raise refusal(f"the export {folder}", error, option=OPTION) from error
    if not entries:
        return
    held = _held(folder)
    for name, value in what.items():
        if held is not None and held.get(name) != value:
            raise ConfigError(
                f"{folder} holds predictions with {name} {held.get(name)!r}, not {value!r}; "
                f"choose another {OPTION}"
            )
    if held is None:
        raise ConfigError(
            f"{folder} is not empty and holds no predictions (it has {min(entries)!r}); "
            f"choose another {OPTION}"
        )


def _held(folder: Path) -> Mapping[str, Any] | None:
    """What a folder says of its predictions; None where it holds none."""
    try:
        found = json.loads((folder / RECORD).read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise refusal(f"the export {folder}", error, option=OPTION) from error
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
