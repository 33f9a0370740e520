"""`mmdiff-cache table`: bad requests are one line, a plan writes nothing, what is missing costs its rows."""

import re
import shlex
from pathlib import Path

import pytest

from mmdiff_cache.cli.app import run
from mmdiff_cache.experiments.world import World
from mmdiff_cache.store.manifest import read_manifest
from pipelines import table_04, table_05

RECIPE = str(table_04.__file__)
RECIPE_OF_TWO = """
from mmdiff_cache.experiments import Row, Table
from mmdiff_cache.experiments.table import claims

def table(world):
    rows = [
        Row(name="all", trainings=(world.training("depth", timesteps=(0.78, 0.52, 0.26)),), paper={{}}),
        Row(name="{name}", trainings=(world.training("depth", timesteps={timesteps}),), paper={{}}),
    ]
    return Table(title="{name}", rows=tuple(rows), claims=claims("all", "{name}", "ours", ("depth",)))
"""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([RECIPE, RECIPE], "recipes need names of their own, got"),
        (["nonesuch.py"], "table needs a recipe (.py) with a function table(world), got nonesuch.py"),
        ([RECIPE, "--dataset", "nonesuch"], "data set 'nonesuch' is not known"),
        ([RECIPE, "--backbone", "nonesuch"], "'nonesuch' is neither a backbone"),
        ([RECIPE, "--encoder", "nonesuch"], "'nonesuch' is neither a discriminative encoder"),
        ([RECIPE, "--data-root", "voc"], "--data-root needs NAME=VALUE such as voc=~/data/VOC, got 'voc'"),
        ([RECIPE, "--data-root", "nonesuch=/"], "--data-root is for data sets"),
        ([RECIPE, "--prompts", "=x"], "--prompts needs NAME=VALUE"),
        (
            [RECIPE, "--seeds", "one"],
            "--seeds needs whole numbers separated by commas such as 0,1,2, got 'one'",
        ),
        ([RECIPE, "--seeds", ","], "--seeds needs whole numbers"),
        ([RECIPE, "--task", "material"], "task 'material' is not in this table; it has segmentation"),
        ([RECIPE, "--row", "nonesuch"], "no row has 'nonesuch' in its name; there are MMDiff"),
        ([RECIPE, "--set", "nonesuch=1"], "has no field 'nonesuch'"),
        ([RECIPE, "--limit", "0"], "Invalid value for '--limit'"),
    ],
)
def test_a_wrong_request_is_one_line(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["table", *words, "--dry-run"]) == 2
    caught = capsys.readouterr()
    assert told in caught.err
    assert not caught.out
    assert "Traceback" not in caught.err
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_returns_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text("def table(world):\n    return world\n")
    assert run(["table", str(recipe), "--dry-run"]) == 2
    assert "table() in " in (error := capsys.readouterr().err)
    assert "must return a Table, it returned World" in error


def test_the_papers_world_is_planned_without_data_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMDIFF_DATA", str(tmp_path / "data"))
    assert run(["table", str(table_05.__file__), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "voc with flux-dev: 4 layers x 4 t, would take 1.2 TB before the codec" in text
    assert "voc with flux-dev: 4 layers x 1 t, would take 303 GB before the codec" in text
    assert "nyu with flux-dev: 4 layers x 4 t, would take 2.5 TB before the codec" in text
    assert "data set 'voc' needs the folder of its files: --data-root DIR" in text
    assert not list(tmp_path.iterdir())


def test_rows_without_weights_cost_nothing_and_others_go_on(
    small: World, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["table", RECIPE, "--dataset", "scenes", "--backbone", small.backbone, "--task", "saliency"]
    command += ["--limit", "4", "--quick", "--out", str(tmp_path / "out")]
    command += [word for key, value in small.settings.items() for word in ("--set", f"{key}={value}")]
    assert run(command) == 0
    caught = capsys.readouterr()
    assert (
        "not run: MMDiff + DINO-v3 (saliency); DINO-v3 (saliency): the weights of dinov3-vitb16"
        in " ".join(caught.err.split())
    )
    assert "next:  mmdiff-cache compare" in caught.out
    assert (tmp_path / "out" / "table-04-saliency" / "table.md").exists()
    assert run([*command, "--set", "decoder=nonesuch"]) == 3
    assert "decoder must be one of" in capsys.readouterr().err


def test_tables_of_one_command_share_stores_and_a_page_of_claims(
    small: World, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, timesteps in (("one", (0.26,)), ("two", (0.52, 0.26))):
        (tmp_path / f"{name}.py").write_text(RECIPE_OF_TWO.format(name=name, timesteps=timesteps))
    command = ["table", str(tmp_path / "one.py"), str(tmp_path / "two.py"), "--dataset", "scenes"]
    command += ["--backbone", small.backbone, "--limit", "4", "--quick", "--out", str(tmp_path / "out")]
    command += [word for key, value in small.settings.items() for word in ("--set", f"{key}={value}")]
    assert run(command) == 0
    stores = list(data.glob("scenes/*/manifest.json"))
    assert len(stores) == 1, "what both read is extracted once"
    assert set(read_manifest(stores[0].parent).splits) == {"train", "final"}
    page = (tmp_path / "out" / "claims.md").read_text()
    again = re.findall(r"`(mmdiff-cache table .*)`", page)
    assert len(again) == 2
    assert page.count("**open**") == 2, "a verdict takes three seeds"
    capsys.readouterr()
    assert run(shlex.split(again[1])[1:]) == 0
    printed = capsys.readouterr().out
    assert "2 runs: 2 finished" in printed
    assert page == (tmp_path / "out" / "claims.md").read_text(), "a part of a table is no table of its own"
