"""A training learns what is there, repeats itself bit for bit, goes on exactly, and refuses what does not
fit.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmdiff_cache.tasks
from mmdiff_cache.config import EmaConfig, TrainConfig
from mmdiff_cache.errors import CheckpointError, ConfigError, TrainingError
from mmdiff_cache.tasks import TASKS
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.build import set_up
from mmdiff_cache.training.folder import locked, new_folder, read_metrics
from mmdiff_cache.training.loop import Reading
from mmdiff_cache.training.resolve import resolve
from mmdiff_cache.training.run import Run, load_run, model_for_run, train
from tests.learnable import LAYERS, METRES, TIMESTEPS, write_store
from tests.training.conftest import small_config


class Stop(Exception):
    """Stands for a kill: it comes up out of the progress callback."""


def stop_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, state: str) -> None:
        if done == step:
            raise Stop

    return progress


def tensors(run: Run) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint."""
    path = run.path / "last.safetensors"
    groups = {name: checkpoint.read_group(path, name) for name in ("raw", "ema", "optimiser", "rng")}
    return {f"{name}/{key}": value for name, group in groups.items() for key, value in group.items()}


def assert_same(one: Run, other: Run) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    strip = [[{k: v for k, v in line.items() if k != "samples_per_second"} for line in read_metrics(run.path)]
             for run in (one, other)]  # fmt: skip
    assert strip[0] == strip[1]


@pytest.mark.parametrize(("task", "least"), [("segmentation", 0.8), ("material", 0.8), ("saliency", 0.75)])
def test_it_learns_what_the_features_show(trained: Callable[[str], Run], task: str, least: float) -> None:
    run = trained(task)
    assert run.finished
    assert run.scores["ema"][TASKS[task].headline] > least


def test_depth_is_learnt_in_metres(trained: Callable[[str], Run]) -> None:
    assert trained("depth").scores["ema"]["abs_rel"] < 0.35


def test_an_untrained_depth_model_answers_the_typical_depth(trained: Callable[[str], Run]) -> None:
    spec = checkpoint.read_header(trained("depth").path / "last.safetensors").spec
    assert METRES.min() < spec["typical_depth"] < METRES.max()
    assert spec["output"] == "depth"


def test_the_run_folder_holds_what_is_promised(trained: Callable[[str], Run], learnable_store: Path) -> None:
    run = trained("segmentation")
    found = {entry.name for entry in run.path.iterdir() if not entry.name.startswith("evaluation")}
    names = (
        "config.json",
        "environment.json",
        "store.json",
        "metrics.jsonl",
        "train.log",
        "last.safetensors",
        "best.safetensors",
        "tensorboard",
        "pictures",
    )
    assert found == set(names)
    config = TrainConfig.from_json(json.loads((run.path / "config.json").read_text()))
    assert config == run.config
    assert config.stores == (str(learnable_store),)
    assert config.layers == LAYERS
    assert config.timesteps == TIMESTEPS
    assert config.concepts == "segmentation"
    assert all(
        getattr(config.aggregator, name) is not None for name in ("layer_scale", "norm", "skip", "cbam")
    )
    lines = read_metrics(run.path)
    assert [line["step"] for line in lines if "held_out" in line] == list(range(4, 41, 4))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]
    assert "going on" not in (run.path / "train.log").read_text()
    text = str(run)
    assert str(run.path) in text
    assert "finished" in text
    assert f"{run.scores['raw']['miou']:.4f}" in text


@pytest.fixture(scope="module")
def steady(learnable_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training that nothing interrupted."""
    return train(small_config(learnable_store, tmp_path_factory.mktemp("runs") / "steady"))


def test_same_seed_same_weights_and_another_seed_others(
    steady: Run, learnable_store: Path, tmp_path: Path
) -> None:
    torch.rand(7)
    assert_same(steady, train(small_config(learnable_store, tmp_path / "again")))
    other = train(small_config(learnable_store, tmp_path / "other", seed=1, steps=1))
    name = "raw/decoder.head.weight"
    assert not torch.equal(tensors(steady)[name], tensors(other)[name])


def test_the_callers_random_numbers_are_left_alone(learnable_store: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(small_config(learnable_store, tmp_path / "run", steps=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kills", [(7,), (2, 3, 11)])
def test_an_interrupted_training_ends_with_the_same_weights(
    steady: Run, learnable_store: Path, tmp_path: Path, kills: tuple[int, ...]
) -> None:
    config = small_config(learnable_store, tmp_path / "interrupted")
    for step in kills:
        with pytest.raises(Stop):
            train(config, progress=stop_at(step))
        assert load_run(config.run or "").step <= step
        assert not load_run(config.run or "").finished
    assert_same(steady, train(config))


def test_going_on_takes_the_configuration_that_the_run_wrote(learnable_store: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(small_config(learnable_store, tmp_path / "run"), progress=stop_at(5))
    config = TrainConfig.from_json(json.loads((tmp_path / "run" / "config.json").read_text()))
    run = train(config)
    assert run.path == tmp_path / "run"
    assert run.finished
    assert "going on from step 5 of 12" in (run.path / "train.log").read_text()


def test_a_finished_run_is_left_as_it_is(learnable_store: Path, tmp_path: Path) -> None:
    config = small_config(learnable_store, tmp_path / "run", steps=3)
    before = tensors(train(config))
    steps: list[int] = []
    after = tensors(train(config, progress=lambda done, total, state: steps.append(done)))
    assert steps == []
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_configuration_is_refused_with_both_values(learnable_store: Path, tmp_path: Path) -> None:
    train(small_config(learnable_store, tmp_path / "run", steps=2))
    with pytest.raises(
        ConfigError, match=r"learning_rate = 0.02, 0.5 was asked; go on with --config .*config.json"
    ):
        train(small_config(learnable_store, tmp_path / "run", steps=2, learning_rate=0.5))


def test_another_store_is_refused(learnable_store: Path, tmp_path: Path) -> None:
    train(small_config(learnable_store, tmp_path / "run", steps=2))
    other = write_store(tmp_path / "store", train=12, test=1)
    with pytest.raises(CheckpointError, match="trained on a store whose sha256_of_ids is"):
        train(small_config(other, tmp_path / "run", steps=2))


def test_a_folder_of_something_else_is_refused_and_kept(learnable_store: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds no run .*thesis.tex"):
        train(small_config(learnable_store, tmp_path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match=r"holds no run .*config.json"):
        train(small_config(learnable_store, model))
    assert (model / "config.json").read_text() == '{"model_type": "t5"}'


def test_two_trainings_never_share_a_folder(learnable_store: Path, tmp_path: Path) -> None:
    run = train(small_config(learnable_store, tmp_path / "run", steps=1))
    with locked(run.path), pytest.raises(ConfigError, match="being trained by another process"):
        train(small_config(learnable_store, tmp_path / "run", steps=1))
    names = [new_folder("depth-x", tmp_path).name for _ in range(3)]
    assert names == ["depth-x-1", "depth-x-2", "depth-x-3"]


def test_runs_are_numbered_where_no_folder_is_named(
    learnable_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [train(small_config(learnable_store, None, steps=1, task="depth")) for _ in range(2)]
    assert [run.path for run in runs] == [tmp_path / "runs" / f"depth-blocks-flux-tiny-{n}" for n in (1, 2)]


def test_a_loss_that_is_no_number_names_its_samples(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", train=4, test=1)
    config = small_config(store, tmp_path / "run", learning_rate=1e30, holdout=0.0, steps=20)
    with pytest.raises(
        TrainingError, match=r"loss became (nan|inf) at step \d+, on samples .*blocks-train-00000\d.*inspect"
    ):
        train(config)


def test_features_at_the_edge_of_float16_do_not_break_a_training(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", train=4, test=1, spoilt="blocks-train-000002")
    run = train(small_config(store, tmp_path / "run", holdout=0.0))
    assert all(torch.isfinite(tensor).all() for tensor in tensors(run).values())


def test_best_is_the_checkpoint_with_the_best_held_out_score(trained: Callable[[str], Run]) -> None:
    run = trained("depth")
    curve = {
        line["step"]: line["held_out"]["ema"]["abs_rel"]
        for line in read_metrics(run.path)
        if "held_out" in line
    }
    best = checkpoint.read_header(run.path / "best.safetensors")
    assert best.best == min(curve.values()) == curve[best.step]


def test_without_a_holdout_there_is_no_best(learnable_store: Path, tmp_path: Path) -> None:
    run = train(small_config(learnable_store, tmp_path / "run", holdout=0.0, steps=2))
    assert run.scores == {}
    with pytest.raises(ConfigError, match=r"has no best weights: .*\(holdout is 0\)"):
        model_for_run(run, "best")


def test_averaged_weights_follow_the_configuration(learnable_store: Path, tmp_path: Path) -> None:
    still = EmaConfig(beta=1.0, warmup=False)
    run = train(small_config(learnable_store, tmp_path / "run", ema=still, steps=3))
    fresh = train(small_config(learnable_store, tmp_path / "none", ema=EmaConfig(beta=0.0), steps=3))
    found, followed = tensors(run), tensors(fresh)
    assert not torch.equal(found["ema/decoder.head.weight"], found["raw/decoder.head.weight"])
    assert torch.allclose(followed["ema/decoder.head.weight"], followed["raw/decoder.head.weight"])


@pytest.mark.parametrize("source", ["latents", "images"])
def test_baseline_sources_train_and_load(learnable_store: Path, tmp_path: Path, source: str) -> None:
    run = train(small_config(learnable_store, tmp_path / "run", source=source, steps=2, batch_size=2))
    assert run.config.concepts == "none"
    assert model_for_run(run, "raw").parameter_counts()


@pytest.mark.parametrize("task", TASKS)
def test_every_default_decoder_takes_a_step(learnable_store: Path, tmp_path: Path, task: str) -> None:
    run = train(
        small_config(learnable_store, tmp_path / "run", task=task, decoder=None, steps=1, batch_size=2)
    )
    assert run.config.decoder == TASKS[task].decoder
    assert run.finished


def test_bfloat16_trains_weights_that_stay_float32(learnable_store: Path, tmp_path: Path) -> None:
    run = train(small_config(learnable_store, tmp_path / "run", precision="bfloat16", steps=4, batch_size=2))
    assert all(tensor.dtype == torch.float32 for tensor in model_for_run(run).state_dict().values())
    assert all(line["loss"] > 0 for line in read_metrics(run.path) if "loss" in line)


def test_a_task_is_one_entry(learnable_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = replace(TASKS["segmentation"], name="surfaces", label="material", vocabulary="depth")
    monkeypatch.setattr(mmdiff_cache.tasks, "TASKS", {**TASKS, "surfaces": fake})
    run = train(small_config(learnable_store, tmp_path / "run", task="surfaces", steps=2))
    assert run.config.concepts == "depth"
    assert run.scores["ema"]["miou"] >= 0


def test_choices_are_put_in_order(learnable_store: Path) -> None:
    config = resolve(small_config(learnable_store, layers=("single.5", "single.1"), timesteps=(0.001, 0.78)))
    assert config.layers == ("single.1", "single.5")
    assert config.timesteps == (0.78, 0.001)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "normals"}, "task 'normals' is not known"),
        ({"label": "parts"}, r"has no labels 'parts'; stored: segmentation \(classes\).*labels add"),
        ({"task": "depth", "label": "saliency"}, "depth needs labels of kind depth, 'saliency' are mask"),
        ({"layers": ("single.9",)}, "layer 'single.9' .* stored"),
        ({"timesteps": (0.5,)}, "timestep 0.5 .* stored"),
        ({"concepts": "animals"}, "'animals' .* stored: segmentation, saliency, depth.*--concepts none"),
        ({"source": "latents", "concepts": "depth"}, "concepts must be none"),
        ({"discriminative": ("dinov3",)}, "discriminative encoder 'dinov3'"),
        ({"device": "gpu"}, "device must be auto, cpu or cuda"),
        ({"device": "cuda:97"}, "torch sees"),
        ({"stores": ("a", "b")}, "exactly one store, got 2: a, b"),
    ],
)
def test_wrong_choices_are_refused_before_a_folder_is_made(
    learnable_store: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        train(small_config(learnable_store, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_the_store_is_found_if_it_is_the_only_one(
    learnable_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMDIFF_DATA", str(tmp_path))
    config = TrainConfig(task="depth")
    with pytest.raises(
        ConfigError, match=r"no store under .* has training labels 'depth'; make one: mmdiff-cache extract"
    ):
        resolve(config)
    (tmp_path / "blocks" / "broken").mkdir(parents=True)
    (tmp_path / "blocks" / "broken" / "manifest.json").write_text("{}")
    for name in ("one", "two"):
        shutil.copytree(learnable_store, tmp_path / "blocks" / name)
        if name == "one":
            assert resolve(config).stores == (str(tmp_path / "blocks" / "one"),)
    with pytest.raises(ConfigError) as caught:
        resolve(config)
    lines = str(caught.value).splitlines()
    assert lines[1:] == [
        f"  mmdiff-cache train --task depth --store {tmp_path}/blocks/{n}" for n in ("one", "two")
    ]
    assert caught.value.exit_code == 2


def test_training_loads_neither_diffusers_nor_transformers_nor_dask(
    learnable_store: Path, tmp_path: Path
) -> None:
    program = f"""
import sys
import mmdiff_cache as mm
from mmdiff_cache.config import AggregatorConfig
tiny = AggregatorConfig(width=8, depth=1, heads=2)
store, run = {str(learnable_store)!r}, {str(tmp_path / "run")!r}
config = mm.TrainConfig(task="saliency", stores=(store,), run=run, steps=2, batch_size=2, aggregator=tiny)
run = mm.train(config)
print(mm.evaluate(run))
banned = ("diffusers", "transformers", "dask", "distributed", "mmdiff_cache.backbones")
sys.exit(", ".join(name for name in banned if name in sys.modules) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert "s_measure" in done.stdout


def test_runs_of_one_order_seed_see_the_same_samples_and_begin_with_other_weights(
    learnable_store: Path, tmp_path: Path
) -> None:
    first, second, own = (
        set_up(resolve(small_config(learnable_store, seed=seed, order_seed=order)))
        for seed, order in ((0, 3), (1, 3), (3, None))
    )
    assert Reading.of(first).seed == Reading.of(second).seed == Reading.of(own).seed == 3
    parts = [setup.parts[0] for setup in (first, second, own)]
    assert len({part.samples.indices for part in parts}) == 1
    assert {part.samples.augment_seed for part in parts} == {3}
    runs = [
        train(small_config(learnable_store, tmp_path / f"run-{seed}", seed=seed, order_seed=3, steps=1))
        for seed in (0, 1)
    ]
    name = "raw/decoder.head.weight"
    assert not torch.equal(tensors(runs[0])[name], tensors(runs[1])[name])
