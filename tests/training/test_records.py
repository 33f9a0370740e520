"""What a training leaves beside its weights: curves, pictures, the environment with the commit, the plan."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_cache.cli.app import run as command
from mmdiff_cache.tasks import TASKS
from mmdiff_cache.training.environment import PACKAGE, environment, source_tree
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.plan import plan
from mmdiff_cache.training.run import Run, train
from mmdiff_cache.visuals.colours import class_colours
from tests.learnable import GRID, PATCH
from tests.training.conftest import small_config
from tests.training.test_run import Stop, stop_at


def curves(run: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def expected_curves(run: Path, task: str) -> dict[str, dict[int, float]]:
    lines = read_metrics(run)
    found = {
        f"train/{name}": {line["step"]: line[name] for line in lines if name in line}
        for name in ("loss", "learning_rate", "gradient_norm")
    }
    name = TASKS[task].headline
    for weights in ("ema", "raw"):
        scored = {line["step"]: line["held_out"][weights][name] for line in lines if "held_out" in line}
        found[f"held_out_{weights}/{name}"] = scored
    return found


def assert_shows(run: Path, task: str) -> None:
    shown = curves(run)
    for name, points in expected_curves(run, task).items():
        assert shown[name].keys() == points.keys(), name
        np.testing.assert_allclose(list(shown[name].values()), list(points.values()), rtol=1e-6)


def test_tensorboard_shows_the_record(trained: Callable[[str], Run]) -> None:
    assert_shows(trained("segmentation").path, "segmentation")


def test_what_is_done_twice_is_shown_once(learnable_store: Path, tmp_path: Path) -> None:
    """Steps behind the checkpoint were written before the interruption, and are purged."""
    config = small_config(learnable_store, tmp_path / "run", checks=3)
    for step in (2, 6, 11):  # before the first checkpoint, behind one, behind another
        with pytest.raises(Stop):
            train(config, progress=stop_at(step))
    run = train(config)
    assert len(list((run.path / "tensorboard").iterdir())) == 4
    assert_shows(run.path, "segmentation")
    files = sorted((run.path / "tensorboard").iterdir())
    train(config)
    assert sorted((run.path / "tensorboard").iterdir()) == files, "a finished run begins no new file"


def test_without_a_holdout_there_are_curves_but_no_pictures(learnable_store: Path, tmp_path: Path) -> None:
    run = train(small_config(learnable_store, tmp_path / "run", holdout=0.0, steps=2))
    assert set(curves(run.path)) == {"train/loss", "train/learning_rate", "train/gradient_norm"}
    assert not (run.path / "pictures").exists()
    assert "pictures" not in str(run)


def test_the_package_loads_no_tensorboard_before_a_curve_is_drawn() -> None:
    code = "import sys, mmdiff_cache.training.evaluate; sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_there_is_a_picture_at_every_check(trained: Callable[[str], Run]) -> None:
    for task in ("segmentation", "saliency", "depth"):
        run = trained(task)
        checks = [line["step"] for line in read_metrics(run.path) if "held_out" in line]
        names = sorted(path.name for path in (run.path / "pictures").iterdir())
        assert names == [f"step-{step:06d}.jpg" for step in checks]
        assert f"pictures {run.path / 'pictures'}" in str(run)


def test_a_picture_shows_prediction_beside_truth(trained: Callable[[str], Run]) -> None:
    """What the model has learnt by the end is nearly the truth, so both columns have nearly its colours."""
    run = trained("segmentation")
    with Image.open(run.path / "pictures" / "step-000040.jpg") as opened:
        assert opened.format == "JPEG"
        sheet = np.asarray(opened.convert("RGB")).astype(int)
    side = GRID * PATCH * 5  # 32 pixels are enlarged to 160
    colours = class_colours(4).astype(int)

    def classes(left: int) -> np.ndarray:
        tile = sheet[-2 * side : -side, left : left + side].reshape(-1, 1, 3)
        return np.abs(tile - colours).sum(axis=-1).argmin(axis=-1)

    edges = [8 + number * (side + 8) for number in (0, 1, 2)]
    assert (classes(edges[1]) == classes(edges[2])).mean() > 0.7


def test_pictures_read_no_features_and_change_no_number(
    learnable_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmdiff_cache.training import pictures

    runs = []
    for shown in (4, 0):
        monkeypatch.setattr(pictures, "SHOWN", shown)
        runs.append(train(small_config(learnable_store, tmp_path / f"run{shown}", memory=0, steps=6)))
    lines = [
        [{k: v for k, v in line.items() if k != "samples_per_second"} for line in read_metrics(run.path)]
        for run in runs
    ]
    assert lines[0] == lines[1]
    assert [(run.path / "pictures").exists() for run in runs] == [True, False]


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_package_and_dirt_is_told(tmp_path: Path) -> None:
    package = tmp_path / "project" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert source_tree(package) is None, "no repository"
    git(tmp_path / "project", "init", "-q")
    assert source_tree(package) is None, "a repository of something else, which does not track the package"
    git(tmp_path / "project", "add", ".")
    git(tmp_path / "project", "commit", "-qm", "one")
    commit = git(tmp_path / "project", "rev-parse", "HEAD")
    assert source_tree(package) == {"commit": commit, "dirty": False}
    (tmp_path / "project" / "elsewhere").write_text("")
    assert source_tree(package) == {"commit": commit, "dirty": False}
    (package / "new.py").write_text("")
    assert source_tree(package) == {"commit": commit, "dirty": True}


def test_every_environment_that_a_training_went_on_in_is_noted(
    learnable_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sessions at two commits, then one that finds nothing to do at a third."""
    config = small_config(learnable_store, tmp_path / "run", checks=6)
    for commit, step in (("first", 3), ("first", 5), ("second", 9), ("second", None), ("third", None)):
        monkeypatch.setattr(
            "mmdiff_cache.training.environment.source_tree",
            lambda package, commit=commit: {"commit": commit, "dirty": False},
        )
        if step is None:
            train(config)
        else:
            with pytest.raises(Stop):
                train(config, progress=stop_at(step))
    noted = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert noted["source"]["commit"] == "first"
    assert [(one["from_step"], one["source"]["commit"]) for one in noted["later"]] == [(4, "second")]
    assert noted["later"][0]["versions"] == noted["versions"]


def test_no_git_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert source_tree(PACKAGE) is None
    assert "source" not in environment("cpu")


def test_train_says_what_it_does_before_and_what_came_out_after(
    learnable_store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_config(learnable_store, tmp_path / "run", steps=10, checks=2, patience=2)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert command(["train", "--config", str(tmp_path / "config.json")]) == 0
    before, after = capfd.readouterr().out.split("\n\n", 1)
    parts = plan(config).parameters
    assert before.splitlines() == [
        "task       segmentation on blocks, judged by miou (higher is better)",
        f"features   3 layers x 3 timesteps of flux-tiny, concepts segmentation, from {learnable_store}",
        "samples    14 trained on, 2 held out",
        "model      aggregator token (appendix_f) 16 wide, decoder linear",
        f"parameters {sum(parts.values()):,}: aggregators {parts['aggregators']:,}, decoder 0, "
        f"head {parts['head']:,}",
        "steps      10 of 4 (2.9 passes), 2 checks, ends after 2 without a better one, float32 on cpu",
    ]
    lines = after.splitlines()
    assert lines[0] == str(tmp_path / "run")
    assert "finished" in lines[1]
    assert [line.split(":")[0].strip() for line in lines[2:4]] == [
        "held-out miou, ema weights",
        "held-out miou, raw weights",
    ]
    assert lines[4] == f"  pictures {tmp_path / 'run' / 'pictures'}"
    assert lines[-1] == f"next:  mmdiff-cache evaluate {tmp_path / 'run'}"
    assert command(["train", "--config", str(tmp_path / "run" / "config.json")]) == 0
    assert f"run        {tmp_path / 'run'}, at step 10" in capfd.readouterr().out
