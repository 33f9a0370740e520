"""Prompt rules: empty, what the data set knows, and files with every way in which a file can be wrong."""

from pathlib import Path

import numpy as np
import pytest

from mmdiff_cache.datasets.prompts import open_prompts
from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.records import Sample

SAMPLE = Sample(sample_id="a", image=np.zeros((2, 2, 3), np.uint8), prompts={"scene": "on sand"})


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_each_rule_finds_its_prompt(tmp_path: Path) -> None:
    assert open_prompts("empty", ("scene",)).prompt(SAMPLE) == ""
    assert open_prompts("scene", ("scene",)).prompt(SAMPLE) == "on sand"
    file = write(tmp_path / "p.jsonl", '{"sample_id": "a", "prompt": "ein Bär"}\n\n'.encode())
    assert open_prompts(file, ()).prompt(SAMPLE) == "ein Bär"


def test_the_identity_of_a_file_is_its_content_not_its_place(tmp_path: Path) -> None:
    line = b'{"sample_id": "a", "prompt": "x"}\n'
    one, two = write(tmp_path / "one.jsonl", line), write(tmp_path / "two.jsonl", line)
    other = write(tmp_path / "other.jsonl", line.replace(b"x", b"y"))
    assert open_prompts(one, ()).identity == open_prompts(two, ()).identity
    assert open_prompts(one, ()).identity != open_prompts(other, ()).identity


def test_an_unknown_rule_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"empty, scene, oracle or a file FILE\.jsonl, got 'orcale'"):
        open_prompts("orcale", ("scene", "oracle"))
    with pytest.raises(ConfigError, match="scene"):
        open_prompts("scene", ())


def test_samples_without_a_prompt_are_named_before_anything_runs(tmp_path: Path) -> None:
    rule = open_prompts(write(tmp_path / "p.jsonl", b'{"sample_id": "a", "prompt": "x"}'), ())
    rule.check(["a"])
    with pytest.raises(DataError, match=r"no prompt for sample 'b' and 1 more"):
        rule.check(["a", "b", "c"])


@pytest.mark.parametrize(
    ("second_line", "complaint"),
    [
        (b'{"sample_id": "a", "prompt": "y"}', r"line 2: sample 'a' already has a prompt \(line 1\)"),
        (b'{"sample_id": "b", "prompt": ', "line 2: not JSON"),
        (b'{"sample_id": "b", "prompt": "\xff"}', "line 2: not UTF-8"),
        (b'{"sample_id": "b"}', "line 2: expected exactly"),
        (b'{"sample_id": "b", "prompt": 3}', "line 2: expected exactly"),
        (b'{"sample_id": "b", "prompt": "x", "seed": 1}', "line 2: expected exactly"),
        (b"[1]", "line 2: expected exactly"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path: Path, second_line: bytes, complaint: str) -> None:
    file = write(tmp_path / "p.jsonl", b'{"sample_id": "a", "prompt": "x"}\n' + second_line + b"\n")
    with pytest.raises(DataError, match=complaint):
        open_prompts(file, ())


def test_an_absent_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        open_prompts(str(tmp_path / "absent.jsonl"), ())
    with pytest.raises(DataError, match="holds no prompts"):
        open_prompts(write(tmp_path / "empty.jsonl", b"\n"), ())
