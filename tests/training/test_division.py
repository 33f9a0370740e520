"""Which samples are trained on and held out: nested across limits, the same for every run's seed."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmdiff_cache.errors import ConfigError, StoreIncomplete
from mmdiff_cache.store.reader import SplitReader, open_store
from mmdiff_cache.training.division import Division, divide, held_out_places
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.resolve import resolve
from mmdiff_cache.training.run import train
from tests.learnable import write_store
from tests.training.conftest import small_config

LABEL = "segmentation"


def divided(reader: SplitReader, **changes: object) -> Division:
    return divide(small_config(reader.path.parent, **changes), reader, LABEL)


def test_smaller_limits_are_contained_in_larger_ones_trained_and_held_out(learnable_store: Path) -> None:
    reader = open_store(learnable_store)["train"]
    divisions = [divided(reader, limit=limit, holdout=0.2) for limit in range(2, 17)]
    for small, large in pairwise(divisions):
        assert set(small.trained) <= set(large.trained)
        assert set(small.held_out) <= set(large.held_out)
    for limit, division in zip(range(2, 17), divisions, strict=True):
        assert len(division.trained) + len(division.held_out) == limit
        assert not set(division.trained) & set(division.held_out)
        assert list(division.trained) == sorted(division.trained)
        assert len(division.held_out) == -(-limit // 5)


def test_the_subset_seed_alone_decides(learnable_store: Path) -> None:
    reader = open_store(learnable_store)["train"]
    first = divided(reader, limit=8)
    assert divided(reader, limit=8, seed=7) == first
    assert divided(reader, limit=8, subset_seed=1) != first
    assert divided(reader, limit=100) == divided(reader)
    assert first.trained + first.held_out != tuple(range(8)), "not the first in stored order"


def test_everything_is_trained_on_where_nothing_is_held_out(learnable_store: Path) -> None:
    reader = open_store(learnable_store)["train"]
    assert divided(reader, holdout=0.0) == Division(trained=tuple(range(16)), held_out=())


def test_nothing_left_to_train_on_is_refused(learnable_store: Path) -> None:
    with pytest.raises(ConfigError, match="leaves none to train on"):
        divided(open_store(learnable_store)["train"], limit=1)


@given(st.integers(1, 2000), st.integers(0, 99))
def test_the_share_is_kept_at_every_length(count: int, percent: int) -> None:
    held = held_out_places(count, percent / 100)
    assert held.sum() == -(-count * percent // 100)
    assert not percent or held[0]


def test_failed_samples_cost_no_other_its_place(tmp_path: Path) -> None:
    whole = write_store(tmp_path / "whole", test=1)
    part = write_store(tmp_path / "part", test=1, failing=("blocks-train-000005",))
    one, other = (divided(open_store(path)["train"], limit=12) for path in (whole, part))
    assert set(one.trained) - {5} == set(other.trained)
    assert set(one.held_out) - {5} == set(other.held_out)


def test_where_all_that_would_be_held_out_failed_it_is_said(tmp_path: Path) -> None:
    reader = open_store(write_store(tmp_path / "whole", test=1))["train"]
    [first] = divided(reader, limit=8).held_out
    store = write_store(tmp_path / "part", test=1, failing=(reader.ids[first],))
    with pytest.raises(ConfigError, match=r"0.1 of 7 sample\(s\) finds none to hold out for segmentation"):
        divided(open_store(store)["train"], limit=8)


def test_steps_are_those_of_the_whole_split_whatever_the_limit(learnable_store: Path) -> None:
    steps = {resolve(small_config(learnable_store, steps=None, limit=n)).steps for n in (2, 8, 16, None)}
    assert steps == {-(-20 * 144 // 40)}


def test_a_split_smaller_than_a_batch_gets_its_passes_too(learnable_store: Path) -> None:
    """A batch of 64 out of 14 samples is a batch of 14."""
    assert resolve(small_config(learnable_store, steps=None, batch_size=64)).steps == 20


def test_a_limit_does_not_excuse_a_store_that_was_never_finished(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", train=8, test=1, stop_after=1)
    with pytest.raises(StoreIncomplete, match="run the extraction"):
        train(small_config(store, tmp_path / "run", limit=4, steps=1))


def test_a_limited_run_is_evaluated_beside_baselines_of_its_own_samples(
    learnable_store: Path, tmp_path: Path
) -> None:
    run = train(small_config(learnable_store, tmp_path / "run", limit=6, steps=2))
    assert "training on 5 samples" in (run.path / "train.log").read_text()
    few, all_ = (
        evaluate(one).baselines["position only"]["miou"]
        for one in (run, train(small_config(learnable_store, tmp_path / "all", steps=2)))
    )
    assert few != all_
