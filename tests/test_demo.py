"""The demo at its smallest: everything it promises is there, and a second run only draws again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from mmdiff_cache import demo
from mmdiff_cache.records import Progress

STAGES = [
    "extract",
    *(f"train {task}" for task in demo.TASKS),
    *(f"evaluate {task}" for task in demo.TASKS),
    "predict",
]


class Watcher:
    """Notes which stages ran, and what was said."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.text: list[str] = []

    @contextmanager
    def bar(self, stage: str) -> Iterator[Progress]:
        self.stages.append(stage)
        yield lambda done, total, state: None

    def run(self, out: Path, backbone: Path) -> demo.DemoResult:
        return demo.run_demo(out, limit=2, backbone=str(backbone), say=self.text.append, bar=self.bar)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_flux_folder: Path
) -> tuple[Path, Watcher, demo.DemoResult]:
    out = tmp_path_factory.mktemp("demo") / "out"
    watcher = Watcher()
    return out, watcher, watcher.run(out, tiny_flux_folder)


def test_every_stage_runs_and_every_task_is_scored_beside_baselines(
    finished: tuple[Path, Watcher, demo.DemoResult],
) -> None:
    _, watcher, result = finished
    assert watcher.stages == STAGES
    assert [evaluation.task for evaluation in result.evaluations] == list(demo.TASKS)
    said = "\n".join(watcher.text)
    for evaluation in result.evaluations:
        assert evaluation.baselines
        assert all(name in said for name in evaluation.baselines)


def test_the_page_shows_every_picture_and_every_picture_can_be_opened(
    finished: tuple[Path, Watcher, demo.DemoResult],
) -> None:
    out, _, result = finished
    page = result.page.read_text(encoding="utf-8")
    drawn = sorted((out / "pictures").glob("*.png"))
    names = {"predictions", *(f"{kind}-{task}" for kind in ("concepts", "timesteps") for task in demo.TASKS)}
    assert {path.stem for path in drawn} == names
    for path in [*drawn, out / "fresh.png", out / "predict" / "fresh-depth.png"]:
        assert path.relative_to(out).as_posix() in page
        with Image.open(path) as picture:
            picture.load()


def test_a_second_run_keeps_store_and_weights(
    finished: tuple[Path, Watcher, demo.DemoResult], tiny_flux_folder: Path
) -> None:
    out, _, result = finished
    kept = [*out.glob("store/**/c/**/*"), *out.glob("runs/*/last.safetensors")]
    before = {path: path.stat().st_mtime_ns for path in kept if path.is_file()}
    assert before
    again = Watcher().run(out, tiny_flux_folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [e.scores for e in again.evaluations] == [e.scores for e in result.evaluations]
