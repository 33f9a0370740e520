"""Evaluation scores full-size predictions by the protocol, and says everything that is needed to read the
numbers.
"""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from mmdiff_cache.errors import CheckpointError, ConfigError, StoreError
from mmdiff_cache.loader import CachedFeatureDataset
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.run import Run, load_run, model_for_run, train
from tests.learnable import CLASSES, GRID, PATCH, write_store
from tests.training.conftest import small_config


def test_scores_are_those_of_full_size_predictions(
    trained: Callable[[str], Run], learnable_store: Path
) -> None:
    """Recomputed sample by sample from the model, the store and the definition of IoU."""
    run = trained("segmentation")
    result = evaluate(run)
    model = model_for_run(run)
    data = CachedFeatureDataset(learnable_store, "test", concepts="segmentation", labels=("segmentation",))
    hits, union = np.zeros(4), np.zeros(4)
    for position in range(len(data)):
        batch = data.batch([position])
        truth = data.reader.original_label("segmentation", position)
        assert truth.shape != (GRID * PATCH, GRID * PATCH)
        features = [a(x) for a, x in zip(model.aggregators, batch.hidden_states.unbind(dim=2), strict=True)]
        logits = model.decoder.head(model.decoder.decode(features, batch.concepts))
        logits = functional.interpolate(logits, size=truth.shape, mode="bilinear", align_corners=False)
        guess, known = logits[0].argmax(dim=0).numpy(), truth != 255
        for number in range(4):
            one, other = (guess == number) & known, (truth == number) & known
            hits[number] += (one & other).sum()
            union[number] += (one | other).sum()
    assert result.scores["miou"] == pytest.approx((hits / union).mean(), abs=2e-3)
    assert list(result.scores["iou"]) == list(CLASSES)
    assert result.samples == 4
    assert result.split == "test"


@pytest.mark.parametrize("task", ["segmentation", "saliency", "depth"])
def test_a_trained_head_beats_every_baseline(trained: Callable[[str], Run], task: str) -> None:
    result = evaluate(trained(task))
    assert "position only" in result.baselines
    for name, scores in result.baselines.items():
        gain = result.scores[result.headline] - scores[result.headline]
        assert (gain if result.higher_is_better else -gain) > 0.1, name


def test_raw_averaged_and_best_weights(trained: Callable[[str], Run]) -> None:
    run = trained("saliency")
    ema, raw, best = (evaluate(run, weights=weights) for weights in ("ema", "raw", "best"))
    assert set(ema.other_weights) == {"raw"}
    assert set(best.other_weights) == {"ema", "raw"}
    assert ema.other_weights["raw"] == raw.scores
    assert raw.other_weights["ema"] == ema.scores == best.other_weights["ema"]
    with pytest.raises(ConfigError, match="weights must be one of ema, raw, best, got 'latest'"):
        evaluate(run, weights="latest")


def test_the_best_weights_are_of_their_own_step(learnable_store: Path, tmp_path: Path) -> None:
    changes = {"steps": 30, "checks": 15, "learning_rate": 0.3, "holdout": 0.5}
    best = 30
    for seed in range(10):  # at such a rate the last step is seldom the best, yet sometimes it is
        run = train(small_config(learnable_store, tmp_path / f"run-{seed}", seed=seed, **changes))
        held_out = {
            line["step"]: line["held_out"]["ema"]["miou"]
            for line in read_metrics(run.path)
            if "held_out" in line
        }
        best = max(held_out, key=lambda step: (held_out[step], -step))
        if best < 30:
            break
    assert best < 30
    assert (evaluate(run).step, evaluate(run, weights="best").step) == (30, best)
    assert f"{best} steps" in str(evaluate(run, weights="best"))


def test_without_held_out_samples_there_are_no_best_weights(learnable_store: Path, tmp_path: Path) -> None:
    run = train(small_config(learnable_store, tmp_path / "run", steps=1, holdout=0.0))
    with pytest.raises(
        ConfigError, match=r"has no best weights: .*holdout is 0\); take --weights ema or raw"
    ):
        evaluate(run, weights="best")


def test_sample_ids_are_no_formulas(trained: Callable[[str], Run]) -> None:
    result = evaluate(trained("depth"))
    own = next(iter(result.per_sample.values()))
    table = dataclasses.replace(result, per_sample={"=1+2": own, "plain": own}).tables()["samples"]
    assert [line.split(",")[0] for line in table.splitlines()] == ["sample_id", "'=1+2", "plain"]


def test_the_table_and_the_file_say_what_was_scored(trained: Callable[[str], Run]) -> None:
    run = trained("depth")
    result = evaluate(run.path)
    text = str(result)
    who = ("depth on blocks test", "flux-tiny", "prompts empty", "lower is better")
    what = ("abs_rel", "delta3", "ema weights", "raw weights", "position only")
    for word in (*who, *what, "original size first", "(0.1, 40.0) m"):
        assert word in text
    assert f"{result.scores['abs_rel']:.4f}" in text
    assert "upper bound" not in text
    kept = json.loads((run.path / "evaluation-test-ema.json").read_text())
    assert kept == json.loads(json.dumps(result.to_json()))
    assert set(kept["per_sample"]) == {f"blocks-test-{n:06d}" for n in range(4)}
    mean = np.mean([scores["abs_rel"] for scores in kept["per_sample"].values()])
    assert result.scores["abs_rel"] == pytest.approx(mean)


def test_scores_by_sample_and_class_are_also_csv(trained: Callable[[str], Run]) -> None:
    run = trained("segmentation")
    result = evaluate(run, weights="raw")
    with (run.path / "evaluation-test-raw-classes.csv").open() as file:
        classes = {row["class"]: float(row["iou"]) for row in csv.DictReader(file)}
    assert classes == result.scores["iou"]
    with (run.path / "evaluation-test-raw-samples.csv").open() as file:
        samples = {row["sample_id"]: {"miou": float(row["miou"])} for row in csv.DictReader(file)}
    assert samples == result.per_sample
    assert set(evaluate(trained("saliency")).tables()) == {"samples"}


def test_many_classes_stay_within_a_terminal(trained: Callable[[str], Run]) -> None:
    """Twenty-one names of VOC's lengths; each number stands right below the end of its name."""
    result = evaluate(trained("segmentation"))
    names = ["background", "aeroplane", "bicycle", *(f"class{n:02d}" for n in range(17)), "tvmonitor"]
    iou = {name: n / 100 for n, name in enumerate(names)} | {"class03": None}
    text = str(dataclasses.replace(result, scores={**result.scores, "iou": iou})).splitlines()
    lines = text[text.index("IoU by class") + 1 : -2]
    assert max(map(len, lines)) <= 80
    found: dict[str, str] = {}
    for above, below in zip(lines[::2], lines[1::2], strict=True):
        found.update(zip(above.split(), below.split(), strict=True))
    assert found == {name: "-" if value is None else f"{value:.4f}" for name, value in iou.items()}
    assert len(lines) == 6


def test_samples_that_no_mean_has_are_told(trained: Callable[[str], Run]) -> None:
    result = evaluate(trained("depth"))
    assert result.scores["skipped"] == 0
    assert "not in the mean" not in str(result)
    some = dataclasses.replace(result, scores={**result.scores, "skipped": 2})
    assert str(some).splitlines()[-1] == "2 of them are not in the mean: no pixel of their labels counts"


def test_aligned_depth_says_so_and_stands_beside_the_metric_one(trained: Callable[[str], Run]) -> None:
    run = trained("depth")
    plain, median, lstsq = (evaluate(run, align=how) for how in ("none", "median", "lstsq"))
    assert lstsq.scores["rmse"] < plain.scores["rmse"]
    assert median.baselines["position only"] != plain.baselines["position only"]
    assert "(--align median)" in str(median)
    assert "no alignment" in str(plain)
    for name, how in (("", "none"), ("-median", "median"), ("-lstsq", "lstsq")):
        assert json.loads((run.path / f"evaluation-test-ema{name}.json").read_text())["align"] == how
    with pytest.raises(ConfigError, match="align 'median' is for depth; segmentation has no scale"):
        evaluate(trained("segmentation"), align="median")
    with pytest.raises(ConfigError, match="align must be one of none, median, lstsq, got 'mean'"):
        evaluate(run, align="mean")


def test_scores_do_not_depend_on_the_batch(trained: Callable[[str], Run]) -> None:
    run = trained("segmentation")
    alone = dataclasses.replace(run, config=dataclasses.replace(run.config, batch_size=1))
    assert evaluate(alone).scores["miou"] == pytest.approx(evaluate(run).scores["miou"], abs=1e-3)


def test_a_run_from_a_machine_with_a_gpu_is_scored_on_the_cpu(trained: Callable[[str], Run]) -> None:
    run = trained("segmentation")
    elsewhere = dataclasses.replace(run, config=dataclasses.replace(run.config, device="cuda:97"))
    assert evaluate(elsewhere).scores == evaluate(run).scores


def test_oracle_prompts_are_called_an_upper_bound(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", train=4, test=1, prompts="oracle")
    run = train(small_config(store, tmp_path / "run", steps=1))
    assert "prompts oracle (the prompts name the objects: an upper bound)" in str(evaluate(run))


def test_splits(trained: Callable[[str], Run]) -> None:
    run = trained("segmentation")
    assert evaluate(run, split="train").samples == 16
    with pytest.raises(ConfigError, match="no split 'val'; it has train, test"):
        evaluate(run, split="val")


def test_a_moved_store_is_found_and_another_one_refused(learnable_store: Path, tmp_path: Path) -> None:
    shutil.copytree(learnable_store, tmp_path / "here")
    run = train(small_config(tmp_path / "here", tmp_path / "run", steps=1))
    shutil.move(tmp_path / "here", tmp_path / "there")
    with pytest.raises(StoreError, match=r"no longer at .*here; say where it is with --store"):
        evaluate(run)
    assert evaluate(run, store=tmp_path / "there").samples == 4
    data = json.loads((tmp_path / "there" / "manifest.json").read_text())
    foreign = dataclasses.replace(run, origin={**run.origin, "fingerprint": "f" * 64})
    with pytest.raises(CheckpointError, match=f"identity ffffffffffff, .* has {data['fingerprint'][:12]}"):
        evaluate(foreign, store=tmp_path / "there")


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        evaluate(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_run(tmp_path)


def test_evaluation_changes_nothing_in_the_run(trained: Callable[[str], Run]) -> None:
    run = trained("saliency")
    before = (run.path / "last.safetensors").read_bytes()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    evaluate(run)
    assert torch.equal(torch.rand(2), expected)
    assert (run.path / "last.safetensors").read_bytes() == before
