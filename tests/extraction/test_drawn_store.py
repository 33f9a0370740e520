"""`extract --dataset prompts` from the file to the store: contents, resume, identity, refusals."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmdiff_cache.cli.app import run as command_line
from mmdiff_cache.config import ExtractConfig, GenerationConfig, NoiseConfig
from mmdiff_cache.errors import ConfigError, DataError, StoreError
from mmdiff_cache.extraction.plan import plan
from mmdiff_cache.extraction.repair import repair
from mmdiff_cache.extraction.resolve import resolve
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.store.convert import Selection, convert, plan_conversion
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.verify import verify

LINES = ["near", "far", "an object", "near", ""]


@pytest.fixture
def drawn(tiny_flux_folder: Path, tmp_path: Path) -> ExtractConfig:
    """Five prompts in three partitions of one batch each; the last batch is short."""
    file = tmp_path / "prompts.jsonl"
    entries = [{"prompt": prompt, "sample_id": f"p{n}", "seed": n // 2} for n, prompt in enumerate(LINES)]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return ExtractConfig(
        dataset="prompts",
        prompts=str(file),
        backbone=str(tiny_flux_folder),
        store=str(tmp_path / "store"),
        resolution=32,
        batch_size=2,
        partition_size=2,
        layers=("double.1", "single.2"),
        timesteps=(0.5, 0.1),
        concepts={"two": ("near", "far")},
        generation=GenerationConfig(steps=2),
    )


def edited(config: ExtractConfig, **changes: Any) -> ExtractConfig:
    assert config.generation is not None
    return replace(config, generation=replace(config.generation, **changes))


def tree(store: Path) -> dict[str, str]:
    parts = [store / "manifest.json", *store.rglob("*.zarr/**/*"), *(store / "partitions").iterdir()]
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in parts
        if path.is_file()
    }


def test_everything_about_a_picture_is_in_the_store(drawn: ExtractConfig) -> None:
    store = extract(edited(drawn, mode="nearest"))
    reader = store["all"]
    everyone = range(len(LINES))
    assert reader.ids == ("p0", "p1", "p2", "p3", "p4")
    assert reader.finished == tuple(everyone)
    assert reader.prompts(everyone) == LINES
    assert reader.generation_seeds(everyone).tolist() == [0, 0, 1, 1, 2]
    np.testing.assert_array_equal(reader.sigmas(everyone), [[0.5, 0.5]] * 5)
    assert len({image.tobytes() for image in reader.images(everyone)}) == 5
    assert reader.read(3, 0.1, "single.2").shape == (4, 4, 32)
    stated = store.manifest.identity["generation"]
    assert {name: stated[name] for name in ("mode", "steps", "guidance", "true_cfg_scale")} == {
        "mode": "nearest",
        "steps": 2,
        "guidance": 3.5,
        "true_cfg_scale": 1.0,
    }
    assert stated["scheduler"]["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert "negative_prompt" not in stated
    assert verify(store.path).sound


def test_an_interrupted_run_ends_with_the_same_bytes(drawn: ExtractConfig, tmp_path: Path) -> None:
    whole = tree(extract(drawn).path)
    config = replace(drawn, store=str(tmp_path / "interrupted"))

    def interrupt(done: int, total: int, state: str) -> None:
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(config, interrupt)
    assert open_store(tmp_path / "interrupted").samples_done < len(LINES)
    assert tree(extract(config).path) == whole


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(drawn: ExtractConfig, tmp_path: Path) -> None:
    """Killed as soon as its first partition is recorded, while it draws the second."""
    whole = tree(extract(drawn).path)
    config = replace(drawn, store=str(tmp_path / "killed"))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_json()))
    command = [sys.executable, "-m", "mmdiff_cache", "extract", "--config", str(file)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "killed" / "partitions" / "all-000000.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert tree(extract(config).path) == whole


def test_lines_can_be_added_and_damage_be_mended(drawn: ExtractConfig, tmp_path: Path) -> None:
    """Both give the bytes of one undisturbed run."""
    whole = tree(extract(drawn).path)
    lines = Path(drawn.prompts).read_text().splitlines(keepends=True)
    fewer = replace(drawn, store=str(tmp_path / "grown"))
    Path(drawn.prompts).write_text("".join(lines[:3]))
    extract(fewer)
    Path(drawn.prompts).write_text("".join(lines))
    with pytest.raises(StoreError, match="--append"):
        extract(fewer)
    grown = extract(fewer, append=True)
    assert tree(grown.path) == whole
    next(grown.path.glob("all.zarr/hidden_states/c.1.*")).write_bytes(b"damage")
    assert repair(grown.path).sound
    assert tree(grown.path) == whole


def test_a_converted_store_keeps_seeds_and_levels(drawn: ExtractConfig, tmp_path: Path) -> None:
    store = extract(drawn)
    smaller = convert(plan_conversion(store.path, tmp_path / "smaller", Selection(timesteps=[0.1])))
    reader = smaller["all"]
    assert reader.generation_seeds([4]).tolist() == [2]
    np.testing.assert_allclose(reader.sigmas([0]), [[0.1]])
    np.testing.assert_array_equal(reader.images([2]), store["all"].images([2]))
    assert verify(smaller.path).sound


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mode": "trajectory"}, "generation.mode is renoise in the store, trajectory was asked"),
        ({"steps": 3}, "generation.steps is 2 in the store, 3 was asked"),
        ({"guidance": 2.0}, "generation.guidance is 3.5 in the store"),
        (
            {"true_cfg_scale": 2.0, "negative_prompt": "far"},
            "generation.negative_prompt is None in the store",
        ),
    ],
)
def test_pictures_drawn_otherwise_do_not_belong_there(
    changes: dict[str, Any], field: str, drawn: ExtractConfig
) -> None:
    extract(replace(drawn, limit=2))
    with pytest.raises(StoreError, match=field):
        extract(edited(replace(drawn, limit=2), **changes))


def test_another_schedule_does_not_belong_there(
    drawn: ExtractConfig, tiny_flux_folder: Path, tmp_path: Path
) -> None:
    config = replace(drawn, limit=2, backbone=str(shutil.copytree(tiny_flux_folder, tmp_path / "tiny")))
    extract(config)
    file = tmp_path / "tiny" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": 3.0}))
    with pytest.raises(StoreError, match=r"generation.scheduler.shift is 1.0 in the store, 3.0 was asked"):
        extract(config)


def test_another_prompt_or_seed_under_the_same_name_is_noticed(drawn: ExtractConfig) -> None:
    extract(drawn)
    file = Path(drawn.prompts)
    content = file.read_text()
    for old, new in (('"an object"', '"a object"'), ('"seed": 2', '"seed": 3')):
        file.write_text(content.replace(old, new))
        with pytest.raises(DataError, match=r"sample 'p[24]' of .* was drawn from another prompt or seed"):
            extract(drawn)


def test_defaults_come_from_the_backbone(drawn: ExtractConfig, tmp_path: Path) -> None:
    resolved = resolve(replace(drawn, generation=None)).generation
    assert resolved == GenerationConfig(mode="renoise", steps=28, guidance=3.5, true_cfg_scale=1.0)
    file = tmp_path / "p.txt"
    file.write_text("near\n")
    for name, steps, scale, negative in (("sd35-medium", 40, 4.5, ""), ("flux-schnell", 4, 1.0, None)):
        config = ExtractConfig(dataset="prompts", prompts=str(file), backbone=name)
        generation = resolve(config).generation
        assert generation is not None
        assert (generation.steps, generation.true_cfg_scale) == (steps, scale)
        assert (generation.guidance, generation.negative_prompt) == (None, negative)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompts": "empty"}, "needs --prompts FILE"),
        ({"data_root": "/tmp"}, "leave out --data-root"),
        ({"dataset": "scenes", "prompts": "empty"}, "leave out --mode and generation"),
        (
            {"generation": GenerationConfig(mode="nearest", guidance=2.0)},
            r"generation.guidance \(2.0\) must be guidance \(3.5\)",
        ),
        (
            {"generation": GenerationConfig(mode="trajectory"), "noise": NoiseConfig(seed=3)},
            "noises nothing, so leave out 'noise'",
        ),
        ({"generation": GenerationConfig(negative_prompt="far")}, "needs generation.true_cfg_scale above 1"),
    ],
)
def test_choices_that_exclude_each_other_are_refused(
    changes: dict[str, Any], complaint: str, drawn: ExtractConfig
) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        plan(replace(drawn, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"steps": 0}, "steps must be positive"),
        ({"true_cfg_scale": 0.5}, "at least 1, got 0.5"),
        ({"seed": -1}, "seed must lie"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        GenerationConfig(**values)


def test_the_plan_says_how_pictures_are_drawn(drawn: ExtractConfig) -> None:
    text = str(plan(edited(drawn, mode="trajectory")))
    assert "trajectory, 2 steps, guidance 3.5" in text
    assert "pictures differ from those of the plain schedule" in text
    passes = {
        mode: plan(edited(drawn, mode=mode)).cost.operations for mode in ("nearest", "renoise", "trajectory")
    }
    assert passes["renoise"] == passes["trajectory"] == 2 * passes["nearest"]
    contrast = plan(edited(drawn, true_cfg_scale=2.0)).cost.operations
    assert contrast == 1.5 * passes["renoise"]


def test_the_command_line_takes_mode_and_steps(
    drawn: ExtractConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["extract", "--dataset", "prompts", "--prompts", drawn.prompts, "--backbone", str(drawn.backbone)]
    words += ["--store", str(tmp_path / "s"), "--mode", "nearest", "--set", "generation.steps=5", "--dry-run"]
    assert command_line(words) == 0
    assert "nearest, 5 steps" in capsys.readouterr().out.replace("\n", " ")
    assert command_line([*words[:-5], "--mode", "closest", "--dry-run"]) == 2
    assert "must be one of trajectory, renoise, nearest" in capsys.readouterr().err.replace("\n", " ")


def test_other_stores_have_no_seeds(drawn: ExtractConfig, config: ExtractConfig) -> None:
    reader = extract(replace(config, limit=1))["val"]
    assert not reader.drawn
    with pytest.raises(ConfigError, match="its pictures were not drawn"):
        reader.generation_seeds([0])
