"""A folder of pictures with a list of them: prompts, splits and label files of one's own.

`metadata.jsonl` or `metadata.csv` in the folder has a row a picture: `file_name`, and where wanted `split`,
`prompt`, and a column for every label set that `labels.json` describes. Paths are below the folder.
"""

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mmdiff_cache.datasets.base import Dataset, safe_id
from mmdiff_cache.datasets.label_folder import LabelFolder, label_spec
from mmdiff_cache.datasets.pairs import check_files
from mmdiff_cache.datasets.pictures import read_picture
from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.records import Sample

LISTS = ("metadata.jsonl", "metadata.csv")
LABELS = "labels.json"
PROMPT = "listed"
"""The kind of prompt that the list gives."""
DEFAULT_SPLIT = "all"
LABEL_FIELDS = {"kind", "classes", "ignore", "valid_range", "scale"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One picture of the list."""

    sample_id: str
    """The path below the folder."""
    image: Path
    split: str
    prompt: str | None
    labels: Mapping[str, Path]


class ListedImages(Dataset):
    """The pictures of a list, in its order."""

    def __init__(self, root: Path, file: Path) -> None:
        self._readers = read_label_sets(root)
        rows = read_rows(file, tuple(self._readers))
        self._rows = {split: [row for row in rows if row.split == split] for split in splits_of(rows)}
        self.label_specs = tuple(reader.spec for reader in self._readers.values())
        files = (path for row in rows for path in (row.image, *row.labels.values()))
        check_files(files, f"{file} lists it: add it, or take out its row")
        self.canvas = self._largest(rows)

    def sample_ids(self, split: str) -> Sequence[str]:
        if split not in self._rows:
            raise ConfigError(f"split {split!r} is not one of {', '.join(self._rows)}")
        return [row.sample_id for row in self._rows[split]]

    def sample_without_prompt(self, kind: str) -> str | None:
        rows = (row for rows in self._rows.values() for row in rows)
        return next((row.sample_id for row in rows if row.prompt is None), None)

    def load(self, split: str, index: int) -> Sample:
        row = self._rows[split][index]
        return Sample(
            sample_id=row.sample_id,
            image=read_picture(row.image),
            prompts={} if row.prompt is None else {PROMPT: row.prompt},
            labels={name: self._readers[name].load(path) for name, path in row.labels.items()},
        )

    def _largest(self, rows: Sequence[Row]) -> tuple[int, int]:
        """Rows and columns in which every label fits, off their headers; loading names one that has none."""
        sizes = [(1, 1)]
        for name, reader in self._readers.items():
            for row in rows:
                try:
                    sizes.append(reader.size(row.labels[name]))
                except DataError as error:
                    logger.warning("%s", error)
        return max(height for height, _ in sizes), max(width for _, width in sizes)


def find_list(root: Path) -> Path | None:
    """The list in a folder, None where there is none. Raises DataError for two."""
    found = [root / name for name in LISTS if (root / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{root} has both {' and '.join(LISTS)}; keep one")
    return found[0] if found else None


def splits_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The splits of a list in the order in which they appear."""
    return tuple(dict.fromkeys(row.split for row in rows))


def read_rows(file: Path, labels: Sequence[str] | None = None) -> list[Row]:
    """The rows of a list, with the files of these label sets; None leaves all labels aside.

    Raises DataError naming the line for what cannot be used: a path that leaves the folder, a picture that is
    listed twice, a row without a label file.
    """
    rows: list[Row] = []
    lines: dict[str, int] = {}
    unused: set[str] = set()
    for number, values in _parse(file):
        where = f"{file}, line {number}"
        row = _row(values, file.parent, labels or (), where)
        if row.sample_id in lines:
            raise DataError(f"{where}: {row.sample_id!r} is listed already (line {lines[row.sample_id]})")
        lines[row.sample_id] = number
        rows.append(row)
        unused |= values.keys() - {"file_name", "split", "prompt", *(labels or ())}
    if not rows:
        raise DataError(f"{file} lists no pictures; each row has at least a file_name")
    if unused and labels is not None:
        names = ", ".join(sorted(unused))
        logger.warning("%s: not used: %s (%s describes no such label)", file, names, LABELS)
    return rows


def read_label_sets(root: Path) -> dict[str, LabelFolder]:
    """What labels.json says of each label set; none without that file.

    Raises DataError for a description that cannot be.

    `{"depth": {"kind": "depth", "valid_range": [0.001, 10], "scale": 0.001}}`
    """
    file = root / LABELS
    if not file.is_file():
        return {}
    try:
        described: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(described, dict):
        raise DataError(f"{file} must be an object with one entry a label set")
    try:
        return {str(name): _label_set(root, str(name), fields) for name, fields in described.items()}
    except ConfigError as error:
        raise DataError(f"{file}: {error}") from error


def _label_set(root: Path, name: str, fields: Any) -> LabelFolder:
    if not isinstance(fields, dict) or not {"kind"} <= fields.keys() <= LABEL_FIELDS:
        known = ", ".join(sorted(LABEL_FIELDS))
        raise ConfigError(f"label set {name!r} needs a kind, and has fields of {known} only")
    scale = fields.get("scale", 1.0)
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not scale > 0:
        raise ConfigError(f"label set {name!r}: scale is metres a unit of the file, got {scale!r}")
    try:
        spec = label_spec(
            name, fields["kind"], fields.get("classes"), fields.get("ignore"), fields.get("valid_range")
        )
    except TypeError as error:
        raise ConfigError(f"label set {name!r}: {error}") from error
    return LabelFolder(root=root, spec=spec, scale=float(scale))


def _parse(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and values of the rows that are not empty."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); it must be UTF-8") from error
    read: Callable[[str, Path], Iterator[tuple[int, Any]]] = _csv if file.suffix == ".csv" else _jsonl
    for number, values in read(text, file):
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
            raise DataError(f"{file}, line {number}: expected named texts, got {str(values)[:80]}")
        yield number, {str(name): text for name, text in values.items() if text}


def _csv(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="beyond", restval="", strict=True)
    try:
        for values in reader:
            yield reader.line_num, values
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: not CSV ({error})") from error


def _jsonl(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: not JSON ({error})") from error


def _row(values: Mapping[str, str], root: Path, labels: Sequence[str], where: str) -> Row:
    for column in ("file_name", *labels):
        if column not in values:
            raise DataError(f"{where}: no {column}; every row needs it")
    image = _inside(values["file_name"], where)
    return Row(
        sample_id=safe_id(image),
        image=root / image,
        split=values.get("split", DEFAULT_SPLIT),
        prompt=values.get("prompt"),
        labels={name: root / _inside(values[name], where) for name in labels},
    )


def _inside(path: str, where: str) -> PurePosixPath:
    """A path below the folder. Raises DataError for one that leads elsewhere."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\0" in path:
        raise DataError(f"{where}: {path!r} leads out of the folder; paths are below it, with /")
    return parts
