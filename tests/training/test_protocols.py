"""The published protocols end to end: stores with the label sets of VOC, DUTS and NYU, whose labels are
ragged, void at the borders and not those of the features; scores against independent implementations.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from mmdiff_cache.datasets import duts, nyu_depth, voc
from mmdiff_cache.loader import CachedFeatureDataset
from mmdiff_cache.records import LabelSpec, PreparedSample
from mmdiff_cache.store.schema import LabelArray
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.run import Run, model_for_run, train
from mmdiff_cache.training.scoring import forward_batch
from tests.learnable import GRID, PATCH, make_sample, make_schema, write_store
from tests.training.conftest import small_config

SIDE, TEST = GRID * PATCH, 3
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def make_run(
    folder: Path, spec: LabelSpec, draw: Draw, sizes: list[tuple[int, int]], canvas: tuple[int, int]
) -> Run:
    """A short training on a store of one label set; test sample n has a label of the n-th size."""

    def sample(sample_id: str) -> PreparedSample:
        number = int(sample_id.split("-")[-1])
        rng = np.random.default_rng([number, *sample_id.encode()])
        labels = {
            name: {spec.name: draw(rng, size)}
            for name, size in (("labels", (SIDE, SIDE)), ("original_labels", sizes[number % len(sizes)]))
        }
        return replace(make_sample(sample_id), **labels)

    schema = make_schema(labels=(LabelArray(spec=spec, canvas=canvas),))
    store = write_store(folder / "store", train=6, test=TEST, schema=schema, sample=sample)
    return train(small_config(store, folder / "run", task=spec.name, steps=6))


def outputs(run: Run) -> list[tuple[np.ndarray, torch.Tensor]]:
    """Each test sample's original label, and the outputs [out h w] on the decoder's grid."""
    model = model_for_run(run)
    name, config = run.config.task, run.config
    data = CachedFeatureDataset(config.stores[0], "test", concepts=config.concepts)
    found: list[tuple[np.ndarray, torch.Tensor]] = []
    with torch.inference_mode():
        for n in range(TEST):
            batch = data.batch([n])
            streams = zip(model.aggregators, batch.hidden_states.unbind(dim=2), strict=True)
            coarse = model.decoder.head(model.decoder.decode([a(x) for a, x in streams], batch.concepts))
            found.append((data.reader.original_label(name, n), coarse[0]))
    return found


def resized(coarse: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    return functional.interpolate(coarse[None], size=shape, mode="bilinear", align_corners=False)[0].numpy()


# --- VOC: 21 classes, void borders, some classes in no label ---

ABSENT = (3, 20)


def draw_classes(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Blocks of classes with a void line between them and a void frame, as in VOC."""
    blocks = rng.integers(0, 21, (3, 3))
    blocks[np.isin(blocks, ABSENT)] = 0
    rows, columns = (np.arange(side) * 3 // side for side in size)
    label = blocks[rows[:, None], columns[None]].astype(np.uint8)
    label[np.flatnonzero(np.diff(rows)), :] = 255
    label[:, np.flatnonzero(np.diff(columns))] = 255
    label[[0, -1]] = 255
    label[:, [0, -1]] = 255
    return label


@pytest.fixture(scope="module")
def voc_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("voc")
    return make_run(folder, voc.LABEL, draw_classes, [(50, 41), (37, 64), (64, 63)], (64, 64))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_voc(voc_run: Run) -> None:
    from torchmetrics.classification import MulticlassJaccardIndex

    result = evaluate(voc_run)
    theirs = MulticlassJaccardIndex(num_classes=21, average="none", ignore_index=255)
    confusion, nearest = np.zeros((21, 21), int), np.zeros((21, 21), int)
    for truth, coarse in outputs(voc_run):
        guess = resized(coarse, truth.shape).argmax(axis=0)
        small = Image.fromarray(coarse.argmax(dim=0).numpy().astype(np.uint8))
        wrong = np.asarray(small.resize(truth.shape[::-1], Image.Resampling.NEAREST))
        theirs.update(torch.from_numpy(guess)[None], torch.from_numpy(truth.astype(np.int64))[None])
        for row, column in np.argwhere(truth != 255):
            confusion[truth[row, column], guess[row, column]] += 1
            nearest[truth[row, column], wrong[row, column]] += 1
    shown = confusion.sum(axis=1) > 0
    assert not shown[list(ABSENT)].any()
    hits = np.diag(confusion)
    iou = hits[shown] / (confusion.sum(axis=0) + confusion.sum(axis=1) - hits)[shown]
    assert list(result.scores["iou"]) == list(voc.CLASSES)
    for number, value in enumerate(result.scores["iou"].values()):
        assert (value is None) == (not shown[number])
    assert result.scores["miou"] == pytest.approx(iou.mean(), abs=1e-6)
    assert result.scores["miou"] == pytest.approx(theirs.compute().numpy()[shown].mean(), abs=1e-6)
    hits = np.diag(nearest)
    other = (hits / (nearest.sum(axis=0) + nearest.sum(axis=1) - hits).clip(1))[shown].mean()
    assert abs(other - iou.mean()) > 1e-3  # argmax first would be another number


# --- DUTS: masks of the picture's size, 8-bit files ---


def draw_mask(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    top, left = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
    mask[top : top + size[0] // 2, left : left + size[1] // 2] = 1
    return mask


def test_duts_from_files(tmp_path: Path) -> None:
    """The field's tool on 8-bit pictures of masks and of what was exported."""
    from py_sod_metrics import MAE, FmeasureHandler, FmeasureV2, Smeasure

    sizes = [(40, 30), (33, 47), (61, 64)]
    run = make_run(tmp_path, duts.LABEL, draw_mask, sizes, (64, 64))
    result = evaluate(run, export=tmp_path / "out")
    files = json.loads((tmp_path / "out" / "predictions.json").read_text())["files"]
    structure, error = Smeasure(), MAE()
    f = FmeasureV2({"f": FmeasureHandler(with_dynamic=True, with_adaptive=False)})
    for (truth, _), name in zip(outputs(run), files.values(), strict=True):
        Image.fromarray(truth * np.uint8(255)).save(tmp_path / "mask.png")
        with Image.open(tmp_path / "mask.png") as mask, Image.open(tmp_path / "out" / name) as guess:
            assert mask.size == guess.size
            for metric in (structure, error, f):
                metric.step(np.asarray(guess), np.asarray(mask))
    assert result.scores["s_measure"] == pytest.approx(structure.get_results()["sm"])
    assert result.scores["max_f"] == pytest.approx(f.get_results()["f"]["dynamic"].max())
    assert result.scores["mae"] == pytest.approx(error.get_results()["mae"])
    assert set(result.per_sample) == set(files)


# --- NYU: 480 x 640, Eigen's crop, 1e-3 to 10 m ---


def draw_depth(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Holes, both ends of the range, what lies beyond, and nonsense outside of the crop."""
    depth = rng.uniform(0.5, 9.5, size).astype(np.float32)
    at = rng.random(size)
    for share, value in ((0.1, 0.0), (0.08, 1e-3), (0.06, 10.0), (0.04, 30.0), (0.02, 5e-4)):
        depth[at < share] = value
    depth[: size[0] * 45 // 480] = 9.9
    return depth


@pytest.fixture(scope="module")
def nyu_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    size = (480, 640)
    return make_run(tmp_path_factory.mktemp("nyu"), nyu_depth.LABEL, draw_depth, [size], size)


@pytest.mark.parametrize("align", ["none", "median", "lstsq"])
def test_nyu(nyu_run: Run, align: str) -> None:
    model, rows = model_for_run(nyu_run), []
    data = CachedFeatureDataset(nyu_run.config.stores[0], "test", concepts=nyu_run.config.concepts)
    for n in range(TEST):
        truth = data.reader.original_label("depth", n)[45:471, 41:601].astype(np.float64)
        with torch.inference_mode():
            guess = forward_batch(model, data.batch([n]), (480, 640))[0, 0].numpy()[45:471, 41:601]
        pairs = [
            (g, t)
            for g, t in zip(guess.ravel().tolist(), truth.ravel().tolist(), strict=True)
            if np.float32(1e-3) < t < 10
        ]
        g, t = np.array(pairs).T
        if align == "median":
            g = g * np.median(t) / np.median(g)
        if align == "lstsq":
            scale, shift = np.polyfit(g, t, 1)
            g = g * scale + shift
        g = np.minimum(np.maximum(g, 1e-3), 10)
        ratio = np.maximum(g / t, t / g)
        rows.append(
            {
                "abs_rel": np.mean(abs(g - t) / t),
                "rmse": np.mean((g - t) ** 2) ** 0.5,
                "log10": np.mean(abs(np.log10(g / t))),
                **{f"delta{k}": np.mean(ratio < 1.25**k) for k in (1, 2, 3)},
            }
        )
    result = evaluate(nyu_run, align=align)
    for name in rows[0]:
        assert result.scores[name] == pytest.approx(np.mean([row[name] for row in rows]), rel=1e-5), name
    assert "rows 45 to 471 and columns 41 to 601" in result.protocol
    assert "(0.001, 10.0) m" in result.protocol
