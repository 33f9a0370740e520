"""Every data set keeps the contract; unknown names are answered with those that are there."""

from pathlib import Path

import numpy as np
import pytest

from mmdiff_cache.datasets.base import Dataset
from mmdiff_cache.datasets.registry import DATASETS, find_dataset
from mmdiff_cache.errors import ConfigError
from tests.datasets.trees import TREES


@pytest.fixture(params=sorted(name for name, entry in DATASETS.items() if not entry.drawn))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dataset(name: str, tmp_path: Path) -> Dataset:
    if not DATASETS[name].needs_root:
        return DATASETS[name].open(None, 32)
    TREES[name](tmp_path)
    return DATASETS[name].open(str(tmp_path), 32)


def test_samples_carry_the_labels_that_are_announced(name: str, dataset: Dataset) -> None:
    for split, count in DATASETS[name].splits.items():
        ids = dataset.sample_ids(split)
        assert len(ids) == len(set(ids)) >= 2
        assert name in TREES or len(ids) == count
        sample = dataset.load(split, 1)
        assert sample.sample_id == ids[1]
        assert sample.image.dtype == np.uint8
        for kind in DATASETS[name].prompt_kinds:
            assert (kind in sample.prompts) == (dataset.sample_without_prompt(kind) is None)
        assert set(sample.labels) == {spec.name for spec in dataset.label_specs}


def test_label_values_lie_where_the_specification_says(dataset: Dataset, name: str) -> None:
    split = next(iter(DATASETS[name].splits))
    for index in range(2):
        labels = dataset.load(split, index).labels
        for spec in dataset.label_specs:
            values = labels[spec.name]
            if spec.kind == "depth":
                assert values.dtype == np.float32
                assert spec.valid_range is not None
                valid = (values >= spec.valid_range[0]) & (values <= spec.valid_range[1])
                assert valid.any()
                assert (values[~valid] == 0).all()
            else:
                known = len(spec.classes) if spec.kind == "classes" else 2
                assert values.dtype == np.uint8
                assert set(np.unique(values)) <= {*range(known), spec.ignore}


def test_splits_of_scenes_share_no_sample() -> None:
    scenes = find_dataset("scenes").open(None, 32)
    ids = [sample_id for split in ("train", "val", "test") for sample_id in scenes.sample_ids(split)]
    assert len(ids) == len(set(ids)) == 2750


def test_an_unknown_data_set_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"data set 'coco' is not known; there are duts, images, nyu,"):
        find_dataset("coco")


def test_scenes_take_no_root() -> None:
    with pytest.raises(ConfigError, match="leave out --data-root"):
        find_dataset("scenes").open("/somewhere", 64)
