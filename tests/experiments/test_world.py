"""Worlds: what is chosen comes last, and results of different worlds never share a folder."""

from pathlib import Path

import pytest

from mmdiff_cache.config import AggregatorConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.experiments.world import SMALL_LIMIT, make_world


def test_the_papers_world_and_the_small_one() -> None:
    paper, small = make_world(), make_world(datasets=["scenes"])
    assert (paper.backbone, paper.limit, paper.steps) == ("flux-dev", None, {})
    assert paper.datasets == {"segmentation": "voc", "saliency": "duts", "depth": "nyu"}
    assert (small.backbone, small.limit, set(small.datasets.values())) == ("flux-scenes", 512, {"scenes"})
    assert paper.training("depth").config.learning_rate == 1e-4
    assert small.training("depth").config.steps == 720
    both = small.together("segmentation", "depth").config
    assert (both.steps, both.mixing) == (1440 + 720, (1440, 720))


def test_worlds_that_differ_in_samples_or_models_have_names_of_their_own(
    tiny_flux_folder: Path, tmp_path: Path
) -> None:
    from tests.tiny_sd3 import save_tiny_sd3

    sd3 = str(save_tiny_sd3(tmp_path / "tiny-sd3"))
    worlds = [
        make_world(),
        make_world(quick=True),
        make_world(limit=4),
        make_world(datasets=["scenes"]),
        make_world(datasets=["scenes"], backbones=[str(tiny_flux_folder)]),
        make_world(backbones=[str(tiny_flux_folder)]),
        make_world(backbones=[sd3]),
        make_world(datasets=["depth=nyu_official"]),
    ]
    assert len({world.name for world in worlds}) == len(worlds)
    assert worlds[6].sd3 == sd3
    assert worlds[6].backbone == "flux-dev"


def test_settings_change_a_field_and_leave_the_rest_of_its_group() -> None:
    world = make_world(datasets=["scenes"], settings={"aggregator.width": "16", "steps": "3"})
    config = world.training("depth", aggregator=AggregatorConfig(kind="concat"), timesteps=(0.26,)).config
    assert (config.aggregator.kind, config.aggregator.width, config.steps) == ("concat", 16, 3)
    assert config.timesteps == (0.26,)
    assert config.learning_rate == 3e-3


def test_one_data_set_is_dealt_out_and_several_are_not() -> None:
    paper, small = make_world(), make_world(datasets=["scenes"])
    assert paper.share(3) is None
    assert small.share(3) == SMALL_LIMIT // 3
    assert make_world(datasets=["scenes"], limit=10**6).share(2) == 1000, "of the scenes that there are"
    assert small.together("segmentation", "depth").config.disjoint
    assert not paper.together("segmentation", "depth").config.disjoint
    assert paper.together("segmentation", "depth").datasets == ("voc", "nyu")


def test_a_data_set_is_exchanged_where_it_is_there() -> None:
    assert make_world().exchanged("nyu", "nyu_1449").datasets["depth"] == "nyu_1449"
    small = make_world(datasets=["scenes"])
    assert small.exchanged("nyu", "nyu_1449") == small


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"datasets": ["nonesuch"]}, "data set 'nonesuch' is not known"),
        ({"datasets": ["material=scenes"]}, "takes NAME or TASK=NAME with segmentation, saliency, depth"),
        ({"backbones": ["nonesuch"]}, "neither a backbone"),
        ({"encoder": "nonesuch"}, "neither a discriminative encoder"),
        ({"settings": {"nonesuch": "1"}}, "has no field 'nonesuch'"),
    ],
)
def test_wrong_choices_are_refused(choice: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_world(**choice)  # type: ignore[arg-type]
