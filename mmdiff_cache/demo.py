"""The main job at demonstration size: rendered scenes, features of the bundled backbone, three heads,
pictures.

    demo/
        store/              features, labels and pictures of the scenes: what `extract` writes
        runs/<task>/        what `train` writes
        pictures/           predictions beside the truth, concept maps, weights of the timesteps
        predict/            one head applied to fresh.png, a scene that is in no store
        index.html          all pictures on one page

Run again it goes on where it was; a finished demo only draws again.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from mmdiff_cache.config import ExtractConfig, TrainConfig
from mmdiff_cache.extraction.plan import plan
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.inference.gallery import concept_sheet, prediction_sheet, show, timestep_sheet
from mmdiff_cache.inference.page import Figure, Page, Row, write_page
from mmdiff_cache.inference.predict import predict
from mmdiff_cache.records import Progress
from mmdiff_cache.scenes import render_scene
from mmdiff_cache.training.evaluate import Evaluation, evaluate
from mmdiff_cache.training.run import Run, train
from mmdiff_cache.visuals.panels import Sheet, draw_sheet, save_png

TASKS: Final = ("segmentation", "saliency", "depth")
SPLITS: Final = ("train", "test")
SAMPLES: Final = 160
"""Of each split: as many as fit into ten minutes on two cores with the passes below."""
PASSES: Final = 10
"""Times that each training sample is seen."""
BATCH_SIZE: Final = 8
LEARNING_RATE: Final = 3e-3
"""Thirty times the paper's, for a training of minutes instead of 20 epochs of ten thousand pictures."""
SHOWN: Final = 8
FRESH_SPLIT, FRESH_INDEX = "val", 0

Bar = Callable[[str], AbstractContextManager[Progress]]
"""Opens a progress display for one stage of the work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What the demo made."""

    page: Path
    store: Path
    evaluations: tuple[Evaluation, ...]
    next_command: tuple[str, ...]


def run_demo(
    out: Path,
    *,
    limit: int | None = None,
    backbone: str | None = None,
    say: Callable[[str], None],
    bar: Bar,
) -> DemoResult:
    """Extract, train, evaluate, predict and draw under `out`.

    `limit` samples of each split are used; few are quick and score badly. `say` gets text for the reader.
    """
    samples = limit or SAMPLES
    stage_one = plan(
        ExtractConfig(
            dataset="scenes", splits=SPLITS, limit=samples, backbone=backbone, store=str(out / "store")
        )
    )
    say(f"1. Features of {stage_one.total} rendered scenes from the frozen backbone\n\n{stage_one}\n")
    with bar("extract") as progress:
        store = extract(stage_one, progress)
    say("2. Three heads, trained from the store alone; the backbone is not needed any more\n")
    runs = [_train(task, store.path, out, samples, bar) for task in TASKS]
    say("3. Scores on the test scenes, beside those of baselines that use no features\n")
    evaluations = tuple(_evaluate(run, say, bar) for run in runs)
    say("4. A picture that is in no store\n")
    fresh = _render_fresh(out / "fresh.png")
    with bar("predict") as progress:
        predicted = predict(runs[-1], [fresh], out=out / "predict", progress=progress)
    say("\n".join(map(str, predicted)))
    page = _draw(runs, out)
    say(f"\npictures  {page}")
    return DemoResult(
        page=page,
        store=store.path,
        evaluations=evaluations,
        next_command=("mmdiff-cache", "train", "--task", "material", "--store", str(store.path)),
    )


def _train(task: str, store: Path, out: Path, samples: int, bar: Bar) -> Run:
    config = TrainConfig(
        task=task,
        stores=(str(store),),
        run=str(out / "runs" / task),
        steps=-(-PASSES * samples // BATCH_SIZE),
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        decoder_rate=1.0,
    )
    with bar(f"train {task}") as progress:
        return train(config, progress)


def _evaluate(run: Run, say: Callable[[str], None], bar: Bar) -> Evaluation:
    with bar(f"evaluate {run.config.task}") as progress:
        evaluation = evaluate(run, split="test", progress=progress)
    say(f"{evaluation}\n")
    return evaluation


def _render_fresh(path: Path) -> Path:
    """A scene of a split that the demo does not extract."""
    Image.fromarray(render_scene(FRESH_SPLIT, FRESH_INDEX, 128).image).save(path)
    return path


def _draw(runs: Sequence[Run], out: Path) -> Path:
    """Draw every sheet, and the page that shows them."""
    shown = [show(run, "test", SHOWN) for run in runs]
    backbone = runs[0].origin["backbone"]
    first = (
        f"The first {len(shown[0].batch.ids)} test scenes, not chosen; each prediction with its own score."
    )
    sheets: dict[str, Sheet | None] = {
        "predictions": prediction_sheet(shown, f"Heads on {backbone}, trained from the cache", first)
    }
    for one in shown:
        name = one.task.name
        sheets[f"concepts-{name}"] = concept_sheet(
            one,
            f"Concept maps for {name}",
            "Share of each concept at each token; every map in its own range.",
        )
        sheets[f"timesteps-{name}"] = timestep_sheet(
            one, f"What each timestep counts for {name}", "Aggregator weights, 1 in sum over timesteps."
        )
    rows = [_row(name, sheet, out / "pictures") for name, sheet in sheets.items() if sheet is not None]
    fresh = [
        Figure(file=out / "fresh.png", caption="a scene that is in no store"),
        *(Figure(file=file, caption="depth") for file in sorted((out / "predict").glob("*-depth.png"))),
    ]
    note = f"Backbone {backbone}. Every picture here was made from the store of features, except the last."
    page = Page(title="mmdiff-cache demo", note=note, rows=[*rows, Row(heading="fresh.png", figures=fresh)])
    return write_page(page, out / "index.html")


def _row(name: str, sheet: Sheet, folder: Path) -> Row:
    file = save_png(draw_sheet(sheet), folder / f"{name}.png")
    return Row(heading=sheet.title, figures=[Figure(file=file, caption=sheet.note)])
