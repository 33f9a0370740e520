"""Which prompt goes with which picture: none, one the data set knows, or one from a file."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.records import Sample

EMPTY = "empty"
ORACLE = "oracle"
"""Prompts of this kind name what the labels ask for: scores with them are an upper bound and say so."""
FROM_FILE = "file sha256:"
"""How the identity of prompts from a file begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRule:
    """A way to find a sample's prompt. `identity` goes into the store: the rule's name or its file's hash."""

    kind: str
    identity: str
    table: Mapping[str, str] | None = None

    def of_id(self, sample_id: str) -> str | None:
        """The prompt of a sample where its id is enough to know it; None where the sample must be read."""
        if self.kind == EMPTY:
            return ""
        return None if self.table is None else self.table.get(sample_id)

    def most(self, sample_ids: Sequence[str]) -> int:
        """At most so many different prompts have these samples."""
        found = {self.of_id(sample_id) for sample_id in sample_ids}
        return len(sample_ids) if None in found else len(found)

    def prompt(self, sample: Sample) -> str:
        """The prompt of one sample. Raises DataError where there is none."""
        if self.kind == EMPTY:
            return ""
        found = (self.table if self.table is not None else sample.prompts).get(
            sample.sample_id if self.table is not None else self.kind
        )
        if found is None:
            raise DataError(f"{sample.sample_id}: no prompt by the rule {self.kind!r}")
        return found

    def check(self, sample_ids: Iterable[str]) -> None:
        """Raise DataError when the file lacks one of these samples."""
        if self.table is None:
            return
        missing = [sample_id for sample_id in sample_ids if sample_id not in self.table]
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(
                f"{self.kind} has no prompt for sample {missing[0]!r}{others}; add a line for each"
            )


def open_prompts(rule: str, kinds: Sequence[str]) -> PromptRule:
    """Understand `--prompts`: `empty`, one of the data set's `kinds`, or a JSONL file of {sample_id, prompt}.

    Raises ConfigError for a rule that is none of these, DataError (with the line) for a file it cannot use.
    """
    if rule == EMPTY or rule in kinds:
        return PromptRule(kind=rule, identity=rule)
    path = Path(rule).expanduser()
    if path.suffix != ".jsonl":
        choices = ", ".join([EMPTY, *kinds])
        raise ConfigError(f"prompts must be one of {choices} or a file FILE.jsonl, got {rule!r}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"prompts file {path} cannot be read: {error.strerror}") from error
    table = parse_table(content, path)
    if not table:
        raise DataError(f'{path} holds no prompts; each line is {{"sample_id": ..., "prompt": ...}}')
    return PromptRule(kind=rule, identity=FROM_FILE + hashlib.sha256(content).hexdigest(), table=table)


def parse_table(content: bytes, path: Path) -> dict[str, str]:
    """The prompts of a JSONL file by sample id. Raises DataError, with the line, for what is none."""
    table: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        sample_id, prompt = _parse_line(raw, where=f"{path}, line {number}")
        if sample_id in table:
            raise DataError(
                f"{path}, line {number}: sample {sample_id!r} already has a prompt (line {lines[sample_id]})"
            )
        table[sample_id], lines[sample_id] = prompt, number
    return table


def _parse_line(raw: bytes, where: str) -> tuple[str, str]:
    try:
        values: Any = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    match values:
        case {"sample_id": str(sample_id), "prompt": str(prompt)} if len(values) == 2:
            return sample_id, prompt
        case _:
            raise DataError(
                f'{where}: expected exactly {{"sample_id": text, "prompt": text}}, got {raw.decode()[:80]}'
            )
