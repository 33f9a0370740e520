"""The command line: what it composes, how it refuses, and what it says when it is stopped."""

import errno
import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from mmdiff_cache.cli import app as application
from mmdiff_cache.cli import console
from mmdiff_cache.cli.app import main, run
from mmdiff_cache.cli.configuration import compose, parse_vocabularies
from mmdiff_cache.config import ExtractConfig, TrainConfig
from mmdiff_cache.datasets.pictures import read_picture
from mmdiff_cache.errors import (
    ConfigError,
    DamageError,
    DataError,
    MMDiffError,
    StorageError,
    StorageRefused,
    StoreError,
)
from tests.datasets.test_pictures import png

RECIPE = """
from mmdiff_cache.config import ExtractConfig, TrainConfig

def extract() -> ExtractConfig:
    return ExtractConfig(dataset="scenes", limit=5, layers=("single.1",))

def train() -> TrainConfig:
    return TrainConfig(task="depth", steps=7)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def test_the_later_of_file_flag_and_assignment_wins(recipe: Path) -> None:
    config = compose(
        ExtractConfig,
        "extract",
        recipe,
        {"limit": 6, "batch_size": 2, "layers": None},
        ["batch_size=3", "noise.seed=4", "partition_size=9"],
    )
    assert (config.limit, config.layers, config.batch_size) == (6, ("single.1",), 3)
    assert (config.noise.seed, config.partition_size) == (4, 9)
    assert config.dataset == ExtractConfig().dataset


def test_a_config_json_of_an_earlier_run_gives_the_same_configuration(tmp_path: Path) -> None:
    config = TrainConfig(task="depth", layers=("single.4",), timesteps=(0.26,), steps=3)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_json()))
    assert compose(TrainConfig, "train", path, {}, []) == config


def test_one_recipe_serves_both_stages(recipe: Path) -> None:
    assert compose(TrainConfig, "train", recipe, {}, []) == TrainConfig(task="depth", steps=7)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.py", None, "not a file"),
        ("no_function.py", "x = 1", "has no function extract()"),
        ("broken.py", "1 / 0", "ZeroDivisionError"),
        ("syntax.py", "def", "SyntaxError"),
        ("wrong.py", "def extract():\n    return 3", "must return a ExtractConfig"),
        ("text.json", "no json", "is not JSON"),
        ("list.json", "[]", "one JSON object"),
        ("field.json", '{"datset": "scenes"}', "no field 'datset'"),
    ],
)
def test_a_config_file_that_cannot_be_used_says_why(
    tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        compose(ExtractConfig, "extract", path, {}, [])
    assert words in str(caught.value)


def test_vocabularies_from_options() -> None:
    assert parse_vocabularies(None) is None
    assert parse_vocabularies(["none"]) == {}
    assert parse_vocabularies(["a=near,in front of", "b= x , y "]) == {
        "a": ["near", "in front of"],
        "b": ["x", "y"],
    }
    with pytest.raises(ConfigError, match="NAME=WORD"):
        parse_vocabularies(["near,far"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["extract", "--datset", "scenes"], "No such option"),
        (["extrct"], "No such command"),
        (["evaluate"], "Missing argument"),
        (["extract", "--limit", "many"], "'--limit'"),
        (["extract", "--timesteps", "0.3,x"], "--timesteps needs numbers"),
        (["extract", "--timesteps", "1.2"], "timesteps lie in [0, 1]"),
        (["extract", "--concepts", "near,far"], "--concepts needs NAME=WORD"),
        (["extract", "--concepts", "depth", "--concepts", "depth=a,b"], "gives 'depth' twice"),
        (["extract", "--set", "text_length=513"], "text_length must be at most 512"),
        (["extract", "--set", "guidance=3", "--backbone", "flux-schnell"], "leave out guidance=3"),
        (["extract", "--set", "noise.seeed=1"], "no field 'seeed'"),
        (["extract", "--set", "limit"], "--set needs KEY=VALUE"),
        (["extract", "--dataset", "[bold]x[/bold]"], "'[bold]x[/bold]' is not known"),
        (["train"], "train needs --task"),
        (["train", "--task", "depth", "--set", "holdout=2"], "holdout must lie in [0, 1)"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    line: list[str],
    words: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(line) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "a refused request writes nothing"


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every command end in `error`."""

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(application, "app", fail)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a"), 2),
        (StoreError("b"), 2),
        (DamageError("c"), 1),
        (StorageError("d"), 4),
        (StorageRefused("r"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 4),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2),
        (MMDiffError("[red]e"), 2),
    ],
)
def test_each_kind_of_error_has_its_exit_code_and_one_line(
    error: BaseException, code: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(error, monkeypatch)
    assert run(["inspect"]) == code
    assert capfd.readouterr().err.count("\n") == 1


def test_lines_to_type_follow_the_error_unbroken(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"  mmdiff-cache train --store {'x' * 300}"
    raising(ConfigError(f"choose one:\n{line}"), monkeypatch)
    assert run(["train"]) == 2
    assert capfd.readouterr().err == f"error: choose one:\n{line}\n"


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(ZeroDivisionError("a bug"), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        run(["inspect"])


def test_interrupted_work_that_knows_better_names_its_own_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, learnable_store: Path, tmp_path: Path
) -> None:
    from mmdiff_cache.training.trainer import Trainer

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "take", stop)
    line = ["train", "--task", "depth", "--store", str(learnable_store), "--steps", "2"]
    assert run(line) == 130
    [folder] = (tmp_path / "runs").iterdir()
    assert f"mmdiff-cache train --config {folder / 'config.json'}" in capfd.readouterr().err
    monkeypatch.undo()
    assert run(["train", "--config", str(folder / "config.json")]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name], "it goes on in its folder"


def test_an_interrupted_command_names_the_line_that_goes_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(KeyboardInterrupt(), monkeypatch)
    assert run(["extract", "--data-root", "my pictures"]) == 130
    assert "mmdiff-cache extract --data-root 'my pictures'" in capfd.readouterr().err


def test_verify_says_it_with_its_exit_code(
    learnable_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(learnable_store, tmp_path / "store"))
    assert run(["verify", str(store), "--limit", "2"]) == 0
    assert "sound" in capsys.readouterr().out
    shard = next((store / "train.zarr/hidden_states").glob("c.0.*"))
    shard.write_bytes(shard.read_bytes()[:-5])
    assert run(["verify", str(store), "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["where"] == f"train.zarr/hidden_states/{shard.name}"
    assert run(["verify", str(tmp_path)]) == 2
    assert "is not a store" in capsys.readouterr().err


def test_a_large_picture_that_is_taken_is_not_called_an_attack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """95 megapixels are within our limit and beyond Pillow's; its warning would be an error here."""
    monkeypatch.setattr(sys, "argv", ["mmdiff-cache", "--version"])
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(variable, "error")
    (tmp_path / "large.png").write_bytes(png(10_000, 9_500))
    with warnings.catch_warnings():
        with pytest.raises(SystemExit):
            main()
        with pytest.raises(DataError, match="perhaps cut off"):
            read_picture(tmp_path / "large.png")


def test_backbones_are_told_without_reading_a_weight(
    capsys: pytest.CaptureFixture[str], tiny_flux_folder: Path
) -> None:
    assert run(["backbones"]) == 0
    said = capsys.readouterr().out
    assert "flux-dev" in said
    assert "Non-Commercial" in said
    assert run(["backbones", "flux-dev", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes_a_sample"] == 100_663_296
    assert facts["token_grid"] == [32, 32]
    assert 21e12 < facts["operations_a_forward"] < 22e12
    assert 15e12 < facts["operations_a_forward_with_128_text_tokens"] < 16e12
    assert facts["bytes_a_prompt"] == 2 * (512 * 4096 + 768)
    assert len(facts["single_blocks"]) == 38
    assert run(["backbones", str(tiny_flux_folder), "--resolution", "64"]) == 0
    said = capsys.readouterr().out
    assert "double.0 double.1" in said
    assert f"--backbone {tiny_flux_folder}" in said.replace("\n", ""), "a line to paste"
    assert run(["backbones", "flux-pro"]) == 2
    assert run(["backbones", "flux-dev", "--resolution", "500"]) == 2


def test_progress_that_goes_into_a_file_is_a_line_now_and_then(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.progress_bar("extract") as advance:
        advance(1, 4, "quick")
        monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
        advance(3, 4, "5 images/s")
    said = capfd.readouterr().err
    assert re.fullmatch(r"extract 3 of 4, 0:00:00 elapsed, ETA 0:00:00  5 images/s\n", said)
