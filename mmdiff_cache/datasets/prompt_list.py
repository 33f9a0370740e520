"""Prompts as a data set: every line of a file is a picture that the backbone draws itself.

(`prompts` is another thing: the rule by which pictures that are there get their prompts.)
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff_cache.datasets.base import Dataset, unsafe_character
from mmdiff_cache.datasets.listed import DEFAULT_SPLIT
from mmdiff_cache.datasets.prompts import PromptRule
from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.records import LARGEST_SEED, PictureRequest, Sample

SUFFIXES = (".txt", ".jsonl")
FORM = '{"prompt": text, "sample_id": text, "seed": number}, the last two as you like'
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEntry:
    """One line of the file."""

    sample_id: str
    prompt: str
    seed: int | None
    """None takes the run's seed."""


class PromptList(Dataset):
    """The prompts of a file in its order, as the one split `all`. There are no pictures to load."""

    def __init__(self, path: Path, entries: Sequence[PromptEntry]) -> None:
        self.path, self.entries = path, tuple(entries)

    def sample_ids(self, split: str) -> Sequence[str]:
        if split != DEFAULT_SPLIT:
            raise ConfigError(
                f"split {split!r} is not one of a list of prompts; it has one split, {DEFAULT_SPLIT!r}"
            )
        return [entry.sample_id for entry in self.entries]

    def load(self, split: str, index: int) -> Sample:
        sample_id = self.sample_ids(split)[index]
        raise DataError(f"sample {sample_id!r} of {self.path} has no picture before it is drawn")

    def request(self, index: int, seed: int) -> PictureRequest:
        """What is to be drawn for one line; `seed` is for lines that have none of their own."""
        entry = self.entries[index]
        return PictureRequest(
            sample_id=entry.sample_id,
            prompt=entry.prompt,
            seed=seed if entry.seed is None else entry.seed,
        )

    @property
    def rule(self) -> PromptRule:
        """Where the prompts come from; none is in the identity, as a sample's content hash covers its own."""
        table = {entry.sample_id: entry.prompt for entry in self.entries}
        return PromptRule(kind=str(self.path), identity="list", table=table)


def open_prompt_list(file: str | None, resolution: int) -> PromptList:
    """Read a text file (one prompt a line) or a JSONL file of {prompt, sample_id?, seed?}; blank lines are
    left out.

    A line without an id is called by its number and a hash of its prompt, `000012-1f3a9c07`.
    Raises ConfigError without a file of these kinds, DataError (with the line) for one it cannot use.
    """
    path = None if file is None else Path(file).expanduser()
    if path is None or path.suffix not in SUFFIXES:
        raise ConfigError(
            f"data set 'prompts' needs --prompts FILE, one prompt a line (.txt) or .jsonl, got {file!r}"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"prompts file {path} cannot be read: {error.strerror}") from error
    entries: dict[str, tuple[int, PromptEntry]] = {}
    for number, entry in _entries(path, content.removeprefix(BYTE_ORDER_MARK)):
        if entry.sample_id in entries:
            first = entries[entry.sample_id][0]
            raise DataError(
                f"{path}, line {number}: sample_id {entry.sample_id!r} was given before (line {first}); "
                "every picture needs its own"
            )
        entries[entry.sample_id] = number, entry
    if not entries:
        raise DataError(f"{path} holds no prompts; write one a line")
    return PromptList(path, [entry for _, entry in entries.values()])


def _entries(path: Path, content: bytes) -> Iterator[tuple[int, PromptEntry]]:
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"{path}, line {number}"
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
        if path.suffix == ".jsonl":
            yield number, _parse(line, number, where)
        else:
            yield number, PromptEntry(sample_id=derived_id(number, line), prompt=line, seed=None)


def derived_id(number: int, prompt: str) -> str:
    """The id of a line without one: its number, counted from 1, and eight digits of its prompt's SHA-256."""
    return f"{number:06d}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def _parse(line: str, number: int, where: str) -> PromptEntry:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    known = isinstance(values, dict) and values.keys() <= {"prompt", "sample_id", "seed"}
    if not known or not isinstance(values.get("prompt"), str):
        raise DataError(f"{where}: expected {FORM}; got {line[:80]}")
    prompt: str = values["prompt"]
    if not _is_text(prompt):
        raise DataError(f"{where}: the prompt is not UTF-8 text: {prompt!a}")
    sample_id = values["sample_id"] if "sample_id" in values else derived_id(number, prompt)
    if not isinstance(sample_id, str) or not sample_id or not _is_safe(sample_id):
        raise DataError(f"{where}: sample_id must be text without control characters, got {sample_id!a}")
    seed = values.get("seed")
    if seed is not None and (type(seed) is not int or not 0 <= seed <= LARGEST_SEED):
        raise DataError(f"{where}: seed must be a whole number from 0 to 2^63 - 1, got {seed!r}")
    return PromptEntry(sample_id=sample_id, prompt=prompt, seed=seed)


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON may hold half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _is_safe(sample_id: str) -> bool:
    return unsafe_character(sample_id) is None
