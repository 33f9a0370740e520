"""What each picture added to a run's scores, kept beside them, so that runs are compared picture by picture.

statistics-depth-test-ema.npz, a plain numpy archive without pickles:
    sample_ids   [n] text, in the order of the split
    contents     [n] text, SHA-256 of each sample's source picture and labels
    values       [n K] float64, as the task's metric describes them; the scores are those of their sum
    about        text, JSON: task, label set, data set, protocol, weights, step, names of the scores
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from mmdiff_cache.config import Config
from mmdiff_cache.errors import CheckpointError, ConfigError, MMDiffError
from mmdiff_cache.loader import CachedFeatureDataset
from mmdiff_cache.metrics import COUNTS, Metric
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.store.reader import SplitReader
from mmdiff_cache.tasks import Task, aligning, find_task
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.protocol import Way, in_words
from mmdiff_cache.training.scoring import Scores

_BAD_CONTENT = (ValueError, KeyError, TypeError, RecursionError, MMDiffError)


@dataclass(frozen=True, kw_only=True, slots=True)
class About(Config):
    """What was scored, and how."""

    task: str
    label: LabelSpec
    data_set: str
    split: str
    weights: str
    align: str
    flip: bool
    protocol: str
    step: int
    scores: tuple[str, ...]
    """Names of the scores that the statistics give."""

    def metric(self) -> Metric:
        """The metric whose statistics these are."""
        task = aligning(find_task(self.task, self.label.name), self.align)
        return task.metric(self.label, self.data_set)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PictureStatistics:
    """One run on one split."""

    about: About
    sample_ids: tuple[str, ...]
    contents: tuple[str, ...]
    values: Float64[np.ndarray, "n K"]


def file_name(task: str, way: Way) -> str:
    """The file in a run's folder."""
    return f"statistics-{task}-{way.name}.npz"


def picture_statistics(
    found: Scores, dataset: CachedFeatureDataset, task: Task, way: Way, *, data_set: str, step: int
) -> PictureStatistics:
    """The statistics of what was just scored, with all that tells it from another scoring."""
    label = dataset.reader.label_specs[task.label]
    names = task.metric(label, data_set).scores_of(found.statistics[:1])
    about = About(
        task=task.name,
        label=label,
        data_set=data_set,
        split=way.split,
        weights=way.weights,
        align=way.align,
        flip=way.flip,
        protocol=in_words(dataset, task, way),
        step=step,
        scores=tuple(name for name in names if name not in COUNTS),
    )
    return PictureStatistics(
        about=about,
        sample_ids=tuple(found.samples),
        contents=_contents(dataset.reader, task.label, dataset.indices),
        values=found.statistics,
    )


def _contents(reader: SplitReader, label: str, samples: Sequence[int]) -> tuple[str, ...]:
    """What tells truths of the same name apart; a label set that was added later has hashes of its own."""
    added: dict[str, str] = {}
    if label in reader.added_labels:
        added = {entry.sample_id: f" {entry.content_hash}" for entry in reader.label_entries(label)}
    return tuple(reader.content_hash(sample) + added.get(reader.ids[sample], "") for sample in samples)


def write_statistics(folder: Path, statistics: PictureStatistics) -> None:
    """Write the file atomically; a former one of the same way is replaced. Raises StorageError."""
    about, archive = statistics.about, io.BytesIO()
    np.savez_compressed(
        archive,
        sample_ids=np.array(statistics.sample_ids),
        contents=np.array(statistics.contents),
        values=statistics.values,
        about=np.array(json.dumps(about.to_json())),
    )
    way = Way(split=about.split, weights=about.weights, align=about.align, flip=about.flip)
    checkpoint.write_bytes(folder / file_name(about.task, way), archive.getvalue())


def read_statistics(run: str | Path, task: str, way: Way) -> PictureStatistics:
    """Read what was kept of a run. Raises ConfigError if there is none, CheckpointError if it is damaged."""
    path = Path(run) / file_name(task, way)
    if not path.exists():
        raise ConfigError(
            f"{run} has no statistics of {task} on {way.name}; "
            f"'mmdiff-cache evaluate {run} --split {way.split}' makes them"
        )
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            statistics = PictureStatistics(
                about=About.from_json(json.loads(str(archive["about"]))),
                sample_ids=tuple(map(str, archive["sample_ids"])),
                contents=tuple(map(str, archive["contents"])),
                values=archive["values"],
            )
            _check(statistics)
    except (OSError, EOFError, zipfile.BadZipFile, *_BAD_CONTENT) as error:
        raise CheckpointError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); delete it, and evaluate the run again"
        ) from error
    return statistics


def _check(statistics: PictureStatistics) -> None:
    values, count = statistics.values, len(statistics.sample_ids)
    length = len(statistics.about.metric().sums)
    if values.shape != (count, length) or len(statistics.contents) != count or values.dtype != np.float64:
        raise ValueError(f"values are {values.dtype} {list(values.shape)}, not float64 [{count}, {length}]")
