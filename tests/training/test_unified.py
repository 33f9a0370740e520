"""Several tasks in one training: whose turn it is, what each loss counts, and what fits together."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.training.unified import Balance, part, parts, task_names, turns

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
