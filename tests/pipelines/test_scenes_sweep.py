"""The example sweep: what it asks for is stored, and the command trains, tabulates and compares it."""

import csv
import json
from pathlib import Path

import pytest

from mmdiff_cache.cli.app import run
from pipelines import scenes, scenes_sweep
from tests.learnable import make_schema, write_store

SMALL = (
    "steps=2", "batch_size=4", "aggregator.width=16", "aggregator.depth=1", "aggregator.heads=2",
)  # fmt: skip


def test_it_reads_what_the_scenes_recipe_stores() -> None:
    stored = scenes.extract().timesteps or ()
    configs = scenes_sweep.sweep()
    assert len(set(map(str, configs))) == 18
    assert {t for config in configs for t in config.timesteps or ()} <= set(stored)
    assert {config.order_seed for config in configs} == {0}


@pytest.mark.slow
def test_the_command_trains_it_and_compares_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = make_schema(timesteps=scenes_sweep.TIMESTEPS["all four"])
    store = write_store(tmp_path / "store", train=8, test=2, schema=schema)
    monkeypatch.chdir(tmp_path)
    command = ["sweep", "--config", scenes_sweep.__file__, "--set", f'stores=["{store}"]']
    for assignment in SMALL:
        command += ["--set", assignment]
    assert run([*command, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "18 runs: 0 finished, 0 to go on, 18 new" in plan
    assert "readings   1 " in plan
    assert run(command) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "runs" / "sweep-scenes_sweep"
    assert "next:  mmdiff-cache compare" in printed
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert (rows[0]["timesteps"], rows[0]["decoder"]) == ("0.001", "dpt")
    assert len(rows) == 6
    assert {row["test abs_rel seeds"] for row in rows} == {"3"}
    assert run([*command, "--dry-run"]) == 0
    assert "18 finished" in capsys.readouterr().out
    assert run(["compare", str(folder), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["differs"] == ["timesteps", "decoder", "seed"]
    assert len(compared["runs"]) == 18


def test_a_recipe_without_sweep_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sweep", "--config", scenes.__file__]) == 2
    assert "has no function sweep()" in capsys.readouterr().err
    (tmp_path / "one.py").write_text("def sweep():\n    return 3\n")
    assert run(["sweep", "--config", str(tmp_path / "one.py")]) == 2
    assert "must return a list of TrainConfig" in capsys.readouterr().err


def test_what_goes_wrong_in_a_recipe_is_one_line_that_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("def sweep():\n    return nothing\n", "import os\nnothing\n"):
        (tmp_path / "one.py").write_text(text)
        assert run(["sweep", "--config", str(tmp_path / "one.py")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "one.py, line 2 cannot be run: NameError: name 'nothing' is not defined" in error


def test_a_sweep_of_which_nothing_can_be_trained_names_no_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "one.py"
    recipe.write_text(
        "from mmdiff_cache.config import TrainConfig\n"
        "def sweep():\n"
        "    return [TrainConfig(task='depth', stores=('nowhere',), seed=n) for n in range(9)]\n"
    )
    assert run(["sweep", "--config", str(recipe), "--out", str(tmp_path / "out")]) == 3
    caught = capsys.readouterr()
    assert caught.err.count("nowhere") == caught.out.count("nowhere") == 1, "one reason, one line"
    assert "1. seed-0 and 8 more: " in caught.err
    assert "next:" not in caught.out


def test_failures_are_listed_and_end_with_code_3(
    learnable_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from mmdiff_cache.config import TrainConfig\n"
        "def sweep():\n"
        f"    values = dict(task='depth', stores=({str(learnable_store)!r},), steps=1, batch_size=4)\n"
        "    return [TrainConfig(**values), TrainConfig(**values, decoder='nonesuch')]\n"
    )
    assert run(["sweep", "--config", str(recipe), "--out", str(tmp_path / "out"), "--no-evaluate"]) == 3
    caught = capsys.readouterr()
    assert "decoder must be one of" in caught.err
    assert "abs_rel" in caught.out
