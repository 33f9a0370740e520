"""What the README shows works: its script runs, its commands and its files exist."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.backbones.registry import BACKBONES
from mmdiff_cache.cli.app import run
from tests.tiny_flux import TEXT_LENGTH, save_tiny_flux

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SIDE = 32


def test_the_python_script_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [script] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "limit=256" in script
    small = dataclasses.replace(
        BACKBONES["flux-scenes"],
        source=str(save_tiny_flux(tmp_path / "flux", single_blocks=5)),
        layers=("single.1", "single.4"),
        resolution=SIDE,
        text_length=TEXT_LENGTH,
    )
    monkeypatch.setitem(BACKBONES, "flux-scenes", small)  # type: ignore[arg-type]
    monkeypatch.delenv("MMDIFF_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save("photo.jpg")
    names: dict[str, object] = {}
    exec(compile(script.replace("limit=256", "limit=2"), "README.md", "exec"), names)
    assert np.asarray(names["x"]).shape == (SIDE // 8, SIDE // 8, 32)
    with Image.open("depth.png") as picture:
        assert picture.size == (60, 40)
    assert "abs_rel" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_command_that_a_page_names_exists(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for command in set(re.findall(r"mmdiff-cache ([a-z]+)", text)) - {"implements"}:
        assert run([command, "--help"]) == 0, command
    for option in set(re.findall(r"`(?:extract|train) (--[a-z-]+)", text)):
        assert run(["extract", "--help"]) == run(["train", "--help"]) == 0
        assert option in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_every_file_that_a_page_links_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(
        r"`((?:docs|tests|mmdiff_cache)/[\w./-]+)`", text
    )
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
