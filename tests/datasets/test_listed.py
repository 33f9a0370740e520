"""A list beside one's own pictures: what it gives, and what is refused by line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.datasets.images import find_splits, open_folder
from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.extraction.plan import plan

LABELS = {
    "parts": {"kind": "classes", "classes": ["left", "right"], "ignore": 255},
    "depth": {"kind": "depth", "valid_range": [0.1, 10], "scale": 0.001},
}
ROWS = [
    {"file_name": name, "split": split, "prompt": prompt, "parts": f"p/{n}.png", "depth": f"d/{n}.png"}
    for n, (name, split, prompt) in enumerate(
        [("b/two.png", "train", 'a, "b"'), ("one.png", "test", ""), ("a.png", "train", "c")]
    )
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, row in enumerate(ROWS):
        for name, kind in (("file_name", "RGB"), ("parts", "L"), ("depth", "I;16")):
            (tmp_path / row[name]).parent.mkdir(parents=True, exist_ok=True)
            Image.new(kind, (6 + number, 4), 0 if kind == "RGB" else 1).save(tmp_path / row[name])
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    (tmp_path / "unlisted.png").write_bytes((tmp_path / "one.png").read_bytes())
    return write(tmp_path, ROWS)


def write(root: Path, rows: list[dict[str, str]]) -> Path:
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_the_list_gives_splits_order_prompts_and_labels(root: Path) -> None:
    assert list(find_splits(str(root))) == ["train", "test"]
    data = open_folder(str(root), 512)
    assert data.sample_ids("train") == ["b/two.png", "a.png"], "in the list's order, and no other picture"
    assert data.canvas == (4, 8)
    first = data.load("train", 0)
    assert first.prompts == {"listed": 'a, "b"'}
    assert (first.labels["parts"] == 1).all()
    np.testing.assert_allclose(first.labels["depth"], 0.001, rtol=1e-6)
    assert data.load("test", 0).prompts == {}
    assert {spec.name: spec.kind for spec in data.label_specs} == {"parts": "classes", "depth": "depth"}


def test_a_table_of_commas_says_the_same(root: Path) -> None:
    before = open_folder(str(root), 512)
    (root / "metadata.jsonl").unlink()
    names = list(ROWS[0])
    quoted = [[f'"{row[name].replace(chr(34), 2 * chr(34))}"' for name in names] for row in ROWS]
    (root / "metadata.csv").write_text("\r\n".join([",".join(names), *map(",".join, quoted)]), "utf-8-sig")
    after = open_folder(str(root), 512)
    for split in ("train", "test"):
        assert after.sample_ids(split) == before.sample_ids(split)
        assert after.load(split, 0).prompts == before.load(split, 0).prompts


def test_plan_takes_the_lists_splits(root: Path, tiny_flux_folder: Path) -> None:
    config = ExtractConfig(
        dataset="images", data_root=str(root), backbone=str(tiny_flux_folder), prompts="listed"
    )
    with pytest.raises(DataError, match=r"one\.png has no prompt, and --prompts listed needs one"):
        plan(config)
    write(root, [{**row, "prompt": row["prompt"] or "d"} for row in ROWS])
    planned = plan(config)
    assert {split: list(ids) for split, ids in planned.samples.items()} == {
        "train": ["b/two.png", "a.png"],
        "test": ["one.png"],
    }
    with pytest.raises(ConfigError, match="split 'val' is not one of images: train, test"):
        plan(ExtractConfig(dataset="images", data_root=str(root), splits=("val",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_name": "../one.png"}, "line 1: '../one.png' leads out of the folder"),
        ({"file_name": "/etc/hosts"}, "leads out of the folder"),
        ({"depth": "../../secret.png"}, "leads out of the folder"),
        ({"file_name": "gone.png"}, "gone.png is missing"),
        ({"parts": "p/gone.png"}, "gone.png is missing"),
        ({"parts": ""}, "line 1: no parts; every row needs it"),
        ({"file_name": "a.png"}, "line 3: 'a.png' is listed already .line 1."),
        ({"file_name": "a\u202e.png"}, "not safe in an id"),
    ],
)
def test_rows_that_cannot_be_used_are_named(root: Path, change: dict[str, str], message: str) -> None:
    write(root, [{**ROWS[0], **change}, *ROWS[1:]])
    with pytest.raises(DataError, match=message):
        open_folder(str(root), 512)


@pytest.mark.parametrize("text", ["", "[1]\n", '{"file_name": 3}\n', "{", "\ud800", '{"split": "x"}'])
def test_lists_that_are_none_are_refused(root: Path, text: str) -> None:
    (root / "metadata.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"metadata\.jsonl"):
        open_folder(str(root), 512)


@pytest.mark.parametrize(
    "labels",
    ["[]", "{", '{"x": {}}', '{"x": {"kind": "depth"}}', '{"x": {"kind": "classes", "classes": 3}}',
     '{"x": {"kind": "mask", "scale": -1}}', '{"x": {"kind": "mask", "colour": 1}}'],
)  # fmt: skip
def test_label_descriptions_that_cannot_be_are_refused(root: Path, labels: str) -> None:
    (root / "labels.json").write_text(labels)
    with pytest.raises(DataError, match=r"labels\.json"):
        open_folder(str(root), 512)


def test_only_columns_without_a_use_are_warned_of(
    root: Path, tiny_flux_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ExtractConfig(dataset="images", data_root=str(root), backbone=str(tiny_flux_folder))
    plan(config)
    assert caplog.text == ""
    write(root, [{**row, "licence": "?", "author": "me"} for row in ROWS])
    plan(config)
    assert [record.getMessage() for record in caplog.records] == [
        f"{root / 'metadata.jsonl'}: not used: author, licence (labels.json describes no such label)"
    ]


def test_described_labels_without_a_list_are_said_to_be_unused(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "metadata.jsonl").unlink()
    assert not open_folder(str(root), 512).label_specs
    assert "labels.json is not used: no metadata.jsonl or metadata.csv says" in caplog.text


def test_two_lists_are_one_too_many(root: Path) -> None:
    (root / "metadata.csv").write_text("file_name\none.png\n")
    with pytest.raises(DataError, match="keep one"):
        open_folder(str(root), 512)
