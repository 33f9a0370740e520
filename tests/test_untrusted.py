"""Files from elsewhere: stores, checkpoints, configurations that were made to do harm, or just by chance."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmdiff_cache.cli.app import run
from mmdiff_cache.cli.console import clean
from mmdiff_cache.config import TrainConfig
from mmdiff_cache.errors import CheckpointError, DamageError
from mmdiff_cache.store.manifest import read_manifest
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.records import seal
from mmdiff_cache.store.verify import verify
from mmdiff_cache.training.checkpoint import read_header
from mmdiff_cache.training.run import model_for_run, train
from tests.store.synthetic import make_manifest, make_schema, write_store

NESTED = b"[" * 100_000
ESCAPE = "\x1b]0;owned\x07\x1b[2J"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", make_manifest(make_schema(), train=3, test=1))
    return tmp_path / "store"


def resealed(file: Path, **changes: object) -> None:
    body = json.loads(file.read_bytes())
    del body["sha256"]
    file.write_bytes(seal({**body, **changes}))


def test_json_that_nests_without_end_is_damage(store: Path, tmp_path: Path) -> None:
    record = store / "partitions/train-000000.json"
    record.write_bytes(NESTED)
    assert open_store(store)["train"].state(0) == "damaged"
    (store / "manifest.json").write_bytes(NESTED)
    with pytest.raises(DamageError):
        open_store(store)
    (tmp_path / "config.json").write_bytes(NESTED)
    assert run(["extract", "--config", str(tmp_path / "config.json"), "--dry-run"]) == 2


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "train.zarr/../../x/y", "test.zarr/a/b"])
def test_a_record_lists_files_of_its_own_split_alone(store: Path, path: str) -> None:
    record = store / "partitions/train-000000.json"
    body = json.loads(record.read_bytes())
    resealed(record, files=[*body["files"], {"path": path, "size": 1, "sha256": "0" * 64}])
    reader = open_store(store)["train"]
    assert reader.state(0) == "damaged"
    with pytest.raises(DamageError, match="no file of split train"):
        reader.hidden_states([0])
    assert not verify(store).sound


@pytest.mark.parametrize(
    "contents",
    [
        {"grid": [100_000, 100_000]},
        {"channels": 2**40},
        {"image_size": [100_000, 100_000]},
        {"partition_size": -1},
        {"layers": []},
        {"codec": "pickle"},
    ],
)
def test_a_manifest_cannot_ask_for_the_whole_memory(store: Path, contents: dict[str, object]) -> None:
    body = json.loads((store / "manifest.json").read_bytes())
    resealed(store / "manifest.json", contents={**body["contents"], **contents})
    with pytest.raises(DamageError):
        open_store(store)


def test_names_do_not_steer_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (f"a{ESCAPE}", "b[/red][bold", "c")
    manifest = make_manifest(splits={"train": names})
    write_store(tmp_path / "store", manifest, failing=(names[0], names[1]))
    monkeypatch.chdir(tmp_path)
    assert run(["inspect", "store"]) == 0
    assert run(["verify", "store"]) == 0
    (tmp_path / "store/partitions/train-000000.json").unlink()
    assert run(["train", "--task", "segmentation", "--set", "label=classes", "--store", "store"]) == 2
    said = capfd.readouterr()
    assert "\x1b]0" not in said.out + said.err
    assert "\x07" not in said.out + said.err
    assert "b[/red][bold" in said.out
    assert clean(f"x{ESCAPE}\n\ty") == "x\ufffd]0;owned\ufffd\ufffd[2J\n\ty"


def test_a_header_that_is_none_of_ours_is_a_checkpoint_error(tmp_path: Path) -> None:
    file = tmp_path / "last.safetensors"
    more = '{"format_version": 1, "x": 2}'
    for header in ("not json", "[1]", "{}", '{"format_version": 1}', NESTED.decode(), more):
        save_file({"raw/x": torch.zeros(1)}, file, {"mmdiff_cache": header})
        with pytest.raises(CheckpointError, match="header"):
            read_header(file)
    save_file({"raw/x": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="not a checkpoint of this package"):
        read_header(file)
    file.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(file)


def test_a_spec_that_asks_for_more_than_the_file_holds_costs_no_memory(
    learnable_store: Path, tmp_path: Path
) -> None:
    trained = train(
        TrainConfig(task="depth", stores=(str(learnable_store),), run=str(tmp_path / "run"), steps=1)
    )
    file = trained.path / "last.safetensors"
    header = dataclasses.asdict(read_header(file))
    header["spec"]["decoder_width"] = 10**6  # some terabytes of weights
    values = json.dumps({"format_version": 1, **header})
    save_file({"ema/x": torch.zeros(1)}, file, {"mmdiff_cache": values})
    with pytest.raises(CheckpointError, match="another configuration"):
        model_for_run(trained)


def test_the_copy_of_a_manifest_in_a_run_is_checked_like_the_manifest(
    learnable_store: Path, tmp_path: Path
) -> None:
    trained = train(
        TrainConfig(task="depth", stores=(str(learnable_store),), run=str(tmp_path / "run"), steps=1)
    )
    copy = trained.path / "store.json"
    copy.write_bytes(copy.read_bytes().replace(b'"grid"', b'"gird"'))
    with pytest.raises(DamageError):
        read_manifest(trained.path, "store.json")
