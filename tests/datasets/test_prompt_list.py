"""A file of prompts as a data set: order, ids, seeds, and every wrong line by its number."""

from pathlib import Path

import pytest

from mmdiff_cache.datasets.prompt_list import PromptList, derived_id, open_prompt_list
from mmdiff_cache.errors import ConfigError, DataError


def written(path: Path, content: str | bytes) -> PromptList:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return open_prompt_list(str(path), 32)


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    listed = written(tmp_path / "p.txt", "\ufeffa red ball\r\n\n  ein Bär  \na red ball")
    assert [entry.prompt for entry in listed.entries] == ["a red ball", "ein Bär", "a red ball"]
    ids = list(listed.sample_ids("all"))
    assert ids == [derived_id(1, "a red ball"), derived_id(3, "ein Bär"), derived_id(4, "a red ball")]
    assert ids[0].startswith("000001-")
    assert [listed.request(n, 5).seed for n in range(3)] == [5, 5, 5]


def test_ids_stay_when_lines_are_added(tmp_path: Path) -> None:
    before = written(tmp_path / "p.txt", "near\nfar\n").sample_ids("all")
    after = written(tmp_path / "p.txt", "near\nfar\nsky\n").sample_ids("all")
    assert after[:2] == before


def test_jsonl_may_name_and_seed_its_lines(tmp_path: Path) -> None:
    named = '{"sample_id": "a", "prompt": "near", "seed": 3}', '{"sample_id": "b", "prompt": ""}'
    listed = written(tmp_path / "p.jsonl", f'{named[0]}\n\n{{"prompt": "far"}}\n{named[1]}')
    assert list(listed.sample_ids("all")) == ["a", derived_id(3, "far"), "b"]
    requests = [listed.request(n, 0) for n in range(3)]
    assert [(r.prompt, r.seed) for r in requests] == [("near", 3), ("far", 0), ("", 0)]
    assert len({r.content_hash for r in requests}) == 3
    assert listed.rule.table == {"a": "near", derived_id(3, "far"): "far", "b": ""}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"prompt": "x"}\nnot json', "line 2: not JSON"),
        ('{"prompt": 3}', "line 1: expected"),
        ('{"sample_id": "a"}', "line 1: expected"),
        ('["x"]', "line 1: expected"),
        ('{"prompt": "x", "steps": 3}', "line 1: expected"),
        ('{"prompt": "x", "sample_id": ""}', "line 1: sample_id must be text"),
        ('{"prompt": "x", "sample_id": null}', "line 1: sample_id must be text"),
        ('{"prompt": "x", "sample_id": "a\\u001b[2J"}', "line 1: sample_id must be text without control"),
        ('{"prompt": "x", "sample_id": "a\\ud800"}', "line 1: sample_id must be text without control"),
        ('{"prompt": "a\\ud800"}', "line 1: the prompt is not UTF-8 text"),
        ('{"prompt": "x", "seed": -1}', "line 1: seed must be a whole number"),
        ('{"prompt": "x", "seed": true}', "line 1: seed must be a whole number"),
        ('{"prompt": "x", "seed": 9223372036854775808}', "line 1: seed must be a whole number"),
        ('{"prompt": "x", "sample_id": "a"}\n{"prompt": "y", "sample_id": "a"}', r"line 2: .* \(line 1\)"),
        (b'{"prompt": "\xff"}', "line 1: not UTF-8"),
        ("\n \n", "holds no prompts"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(content: str | bytes, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        written(tmp_path / "p.jsonl", content)
    assert "\n" not in str(caught.value)


def test_other_files_and_splits_are_refused(tmp_path: Path) -> None:
    for wrong in (None, "empty", str(tmp_path / "p.csv")):
        with pytest.raises(ConfigError, match="needs --prompts FILE"):
            open_prompt_list(wrong, 32)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        open_prompt_list(str(tmp_path / "absent.txt"), 32)
    listed = written(tmp_path / "p.txt", "near")
    with pytest.raises(ConfigError, match="one split, 'all'"):
        listed.sample_ids("train")
    with pytest.raises(DataError, match="no picture before it is drawn"):
        listed.load("all", 0)
