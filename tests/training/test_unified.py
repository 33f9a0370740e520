"""Several tasks in one training: whose turn it is, what each loss counts, and what fits together."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.training.build import set_up
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.resolve import resolve
from mmdiff_cache.training.run import Run, load_run, model_for_run, train
from mmdiff_cache.training.unified import Balance, part, parts, task_names, turns
from tests.learnable import write_store
from tests.training.conftest import small_config
from tests.training.test_run import Stop, assert_same, stop_at

ALL = "segmentation+saliency+depth"
RATIOS = st.lists(st.floats(0.1, 10), min_size=1, max_size=4)


@given(RATIOS, st.integers(0, 200))
def test_each_task_has_had_its_share_at_any_moment(ratio: list[float], steps: int) -> None:
    had = Counter(turns(ratio, 0, steps))
    for task, value in enumerate(ratio):
        assert abs(had[task] - steps * value / sum(ratio)) < len(ratio)


@given(RATIOS, st.integers(0, 60), st.integers(0, 60))
def test_turns_go_on_where_they_stopped(ratio: list[float], start: int, more: int) -> None:
    assert list(turns(ratio, start, start + more)) == list(turns(ratio, 0, start + more))[start:]


def test_equal_shares_go_round() -> None:
    assert list(turns([1, 1, 1], 0, 6)) == [0, 1, 2, 0, 1, 2]
    assert Counter(turns([2, 1], 0, 300)) == {0: 200, 1: 100}


def test_a_loss_counts_by_its_mean_over_the_first_steps_and_is_then_frozen() -> None:
    balance = Balance(("segmentation", "depth"), steps=3)
    assert balance.weight("segmentation", 2.0) == pytest.approx(1 / 2)
    assert balance.weight("segmentation", 4.0) == pytest.approx(1 / 3)
    assert balance.weight("depth", 0.5) == pytest.approx(1 / 0.5)
    assert balance.weight("segmentation", 3.0) == pytest.approx(1 / 3)
    assert balance.weight("segmentation", 100.0) == pytest.approx(1 / 3)
    assert balance.weight("depth", 1.5) == pytest.approx(1.0)


def test_the_balance_goes_on_exactly() -> None:
    losses = torch.rand(12, generator=torch.Generator().manual_seed(0)).tolist()
    whole, half = (Balance(("a", "b"), steps=4) for _ in range(2))
    expected = [whole.weight("ab"[n % 2], loss) for n, loss in enumerate(losses)]
    found = [half.weight("ab"[n % 2], loss) for n, loss in enumerate(losses[:5])]
    other = Balance(("a", "b"), steps=4)
    other.unpack({name: tensor.clone() for name, tensor in half.pack().items()})
    found += [other.weight("ab"[n % 2], loss) for n, loss in enumerate(losses[5:], 5)]
    assert found == expected


def test_given_weights_are_kept_and_one_task_counts_one() -> None:
    assert Balance(("a", "b"), steps=4, weights=(0.5, 3.0)).weight("b", 7.0) == 3.0
    assert Balance(("a",), steps=4).weight("a", 7.0) == 1.0


def test_parts_are_the_trainings_that_each_task_would_have_alone() -> None:
    config = TrainConfig(task="segmentation+depth", stores=("voc", "nyu"), steps=10)
    assert task_names(config) == ("segmentation", "depth")
    assert [(one.task, one.stores, one.concepts) for one in parts(config)] == [
        ("segmentation", ("voc",), "unified"),
        ("depth", ("nyu",), "unified"),
    ]
    alone = TrainConfig(task="depth", stores=("nyu",))
    assert parts(alone) == (alone,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "depth+depth"}, "names a task twice"),
        ({"stores": ("a", "b", "c")}, "need a store each"),
        ({"label": "material"}, "label cannot be chosen"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, object], words: str) -> None:
    values = {"task": "segmentation+depth", "stores": ("a", "b"), **changes}
    with pytest.raises(ConfigError, match=words):
        parts(TrainConfig.from_json(values))


def test_a_task_of_another_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="trained for depth, not for 'saliency'"):
        part(TrainConfig(task="depth"), "saliency")


@pytest.fixture(scope="module")
def run(learnable_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One model for three tasks, each taught by samples of its own."""
    folder = tmp_path_factory.mktemp("unified") / "run"
    return train(small_config(learnable_store, folder, task=ALL, disjoint=True, holdout=0.3, steps=150))


@pytest.mark.parametrize(("task", "least"), [("segmentation", 0.7), ("saliency", 0.7), ("depth", -0.5)])
def test_one_model_learns_three_tasks(run: Run, task: str, least: float) -> None:
    result = evaluate(run, task=task)
    sign = 1 if result.higher_is_better else -1
    assert sign * result.scores[result.headline] > least
    for name, scores in result.baselines.items():
        assert sign * (result.scores[result.headline] - scores[result.headline]) > 0.05, name
    assert (run.path / f"evaluation-{task}-test-ema.json").exists()


def test_a_start_that_came_to_nothing_leaves_no_pictures(learnable_store: Path, tmp_path: Path) -> None:
    """Stopped before its first checkpoint, and begun again with fewer checks."""
    config = small_config(learnable_store, tmp_path / "run", task="segmentation+depth", steps=4, checks=1)
    for task in ("segmentation", "depth"):
        (tmp_path / "run" / "pictures" / task).mkdir(parents=True)
        (tmp_path / "run" / "pictures" / task / "step-000002.jpg").write_bytes(b"")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_json()))
    run = train(config)
    assert [path.name for path in run.path.glob("pictures/*/*.jpg")] == ["step-000004.jpg"] * 2


def test_each_sample_serves_one_task(learnable_store: Path) -> None:
    setup = set_up(resolve(small_config(learnable_store, task=ALL, disjoint=True, holdout=0.3)))
    taught = [index for one in setup.parts for index in one.samples.indices]
    held = [index for one in setup.parts for index in (one.held_out.indices if one.held_out else ())]
    assert len(set(taught + held)) == len(taught) + len(held)
    alone = set_up(resolve(small_config(learnable_store, task="depth", holdout=0.3)))
    assert sorted(taught) == list(alone.parts[0].samples.indices)
    with pytest.raises(ConfigError, match="disjoint leaves task depth no sample to hold out"):
        set_up(resolve(small_config(learnable_store, task=ALL, disjoint=True)))


def test_the_tasks_share_all_but_their_rows_of_the_head(run: Run) -> None:
    models = {task: model_for_run(run.for_task(task)) for task in run.tasks}
    channels = {task: model.head.channels for task, model in models.items()}  # type: ignore[union-attr]
    assert channels == {"segmentation": 4, "saliency": 1, "depth": 1}


def test_an_interrupted_training_of_several_tasks_ends_with_the_same_weights(
    learnable_store: Path, tmp_path: Path
) -> None:
    changes = {"task": "depth+segmentation", "steps": 14, "balance_steps": 4, "mixing": (2.0, 1.0)}
    whole = train(small_config(learnable_store, tmp_path / "whole", **changes))
    with pytest.raises(Stop):
        train(small_config(learnable_store, tmp_path / "parts", **changes), stop_at(9))
    again = train(small_config(learnable_store, tmp_path / "parts", **changes))
    assert_same(whole, again)


def test_without_a_task_what_can_be_chosen_is_said(run: Run) -> None:
    for act in (evaluate, model_for_run):
        with pytest.raises(ConfigError, match="segmentation, saliency, depth"):
            act(run.path)


def test_what_a_run_says_names_every_task(run: Run) -> None:
    text = str(load_run(run.path))
    assert [name for name in ("miou", "s_measure", "abs_rel") if f"held-out {name}, ema" in text] == [
        "miou", "s_measure", "abs_rel"
    ]  # fmt: skip
    lines = [line["held_out"]["ema"] for line in read_metrics(run.path) if "held_out" in line]
    assert set(lines[-1]) == set(run.tasks)


def test_stores_that_were_extracted_differently_are_refused(learnable_store: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", weights="1" * 64)
    config = small_config(
        learnable_store, task="segmentation+depth", stores=(str(learnable_store), str(other))
    )
    with pytest.raises(ConfigError, match="their weights_sha256 is 0000"):
        set_up(resolve(config))
