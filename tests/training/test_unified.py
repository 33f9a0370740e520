"""Several tasks in one training: whose turn it is, what each loss counts, and what fits together."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.store.schema import Variant, Vocabulary
from mmdiff_cache.training.build import set_up
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.plan import plan
from mmdiff_cache.training.resolve import resolve
from mmdiff_cache.training.run import Run, load_run, model_for_run, train
from mmdiff_cache.training.unified import Balance, check_same_identity, part, parts, task_names, turns
from tests.learnable import BLOCKS, ENCODER, MAP_BLOCKS, VOCABULARIES, make_rich_schema, write_store
from tests.training.conftest import small_config
from tests.training.test_records import curves
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
    with pytest.raises(ConfigError, match=r"dealt out to 3 tasks, finds none to hold out for depth"):
        set_up(resolve(small_config(learnable_store, task=ALL, disjoint=True)))


def test_samples_dealt_out_are_nested_for_each_task(learnable_store: Path) -> None:
    """A smaller limit is contained in a larger one task by task, as for one task alone."""

    def dealt(limit: int) -> list[tuple[set[int], set[int]]]:
        config = small_config(learnable_store, task=ALL, disjoint=True, holdout=0.4, limit=limit)
        return [
            (set(one.samples.indices), set(one.held_out.indices if one.held_out else ()))
            for one in set_up(resolve(config)).parts
        ]

    for small, large in pairwise(map(dealt, range(7, 17))):
        for (trained, held), (more, more_held) in zip(small, large, strict=True):
            assert trained <= more
            assert held <= more_held


def test_a_failed_sample_moves_no_other_to_another_task(learnable_store: Path, tmp_path: Path) -> None:
    part_of = write_store(tmp_path / "part", test=1, failing=("blocks-train-000005",))
    whole, without = (
        [set(one.samples.indices) for one in set_up(resolve(small_config(
            store, task=ALL, disjoint=True, holdout=0.3))).parts]
        for store in (learnable_store, part_of)
    )  # fmt: skip
    assert [samples - {5} for samples in whole] == without


def test_tasks_that_share_samples_out_make_as_many_passes_as_each_alone(learnable_store: Path) -> None:
    """Twenty epochs of the samples that each task has (Paper: Sec. 4.1): two tasks have half of them each."""
    task = "segmentation+depth"
    one, both, dealt = (
        resolve(small_config(learnable_store, steps=None, **changes)).steps
        for changes in ({}, {"task": task}, {"task": task, "disjoint": True})
    )
    assert one is not None
    assert (both, dealt) == (2 * one, one)


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


def test_the_plan_says_how_tasks_are_mixed(learnable_store: Path) -> None:
    changes = {"task": "segmentation+depth", "mixing": (2.0, 1.0), "steps": 9}
    text = str(plan(small_config(learnable_store, **changes)))
    assert "batches of segmentation, depth as 2 : 1, losses count 1 / the mean of their first 50" in text
    assert "9 of 4 (1.3 passes)" in text
    given = str(plan(small_config(learnable_store, **changes, loss_weights=(1.0, 0.3))))
    assert "losses count 1, 0.3" in given


def test_losses_of_all_tasks_are_written_down(learnable_store: Path, tmp_path: Path, monkeypatch) -> None:
    """Every second step of two that alternate is always the same one's."""
    monkeypatch.setattr("mmdiff_cache.training.trainer.LOG_LINES", 10)
    changes = {"task": "segmentation+depth", "steps": 20, "balance_steps": 4}
    run = train(small_config(learnable_store, tmp_path / "run", **changes))
    lines = [line for line in read_metrics(run.path) if "loss" in line]
    steps = {task: [line["step"] for line in lines if line["task"] == task] for task in run.tasks}
    assert steps == {"segmentation": [3, 7, 11, 15, 19], "depth": [4, 8, 12, 16, 20]}
    for task in run.tasks:
        weights = [line["loss_weight"] for line in lines if line["task"] == task]
        assert weights[1:] == weights[1:2] * 4, "frozen after four batches"
    assert {f"train/{task}/loss" for task in run.tasks} <= set(curves(run.path))
    with pytest.raises(Stop):
        train(small_config(learnable_store, tmp_path / "parts", **changes), stop_at(13))
    assert_same(run, train(small_config(learnable_store, tmp_path / "parts", **changes)))


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


def test_captions_of_its_own_are_no_other_way_to_extract() -> None:
    """Paper: Sec. 4.4, each picture has its caption; so the files of two data sets are never the same."""
    captions = [{"dtype": "bfloat16", "prompts": f"file sha256:{digit * 64}"} for digit in "01"]
    check_same_identity({"voc": captions[0], "nyu": captions[1]})
    with pytest.raises(ConfigError, match="voc and nyu: their prompts is a file and empty"):
        check_same_identity({"voc": captions[0], "nyu": {"dtype": "bfloat16", "prompts": "empty"}})
    with pytest.raises(ConfigError, match="their dtype is bfloat16 and float32"):
        check_same_identity({"voc": captions[0], "nyu": {**captions[1], "dtype": "float32"}})


def test_stores_whose_concepts_or_encoders_differ_are_refused(tmp_path: Path) -> None:
    """As many channels, of other words or of another encoder of the same name: shapes would fit."""

    def store(name: str, words: tuple[str, ...] = VOCABULARIES["unified"], eyes: str = "0") -> str:
        vocabularies = tuple(
            Vocabulary(name=one, concepts=concepts, blocks=BLOCKS, map_blocks=MAP_BLOCKS)
            for one, concepts in {**VOCABULARIES, "unified": words}.items()
        )
        encoder = replace(ENCODER, weights_sha256=eyes * 64)
        schema = make_rich_schema(vocabularies=vocabularies, discriminative=(encoder,), variants=(Variant(),))
        return str(write_store(tmp_path / name, train=4, test=1, schema=schema))

    first, words, eyes = store("a"), store("b", ("far", "near", "background", "object")), store("c", eyes="1")

    def set_up_with(other: str, **changes: object) -> None:
        values = {"task": "segmentation+depth", "stores": (first, other), "holdout": 0.0, **changes}
        set_up(resolve(small_config(Path(first), **values)))

    with pytest.raises(ConfigError, match="their vocabulary unified is object, background, near, far and"):
        set_up_with(words)
    set_up_with(words, concepts="depth")
    with pytest.raises(ConfigError, match="their weights of eyes is 0000"):
        set_up_with(eyes, discriminative=("eyes",))
    set_up_with(eyes)
