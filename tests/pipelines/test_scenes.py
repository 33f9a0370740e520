"""The scenes recipe spells out what the registries hold as defaults, so that the two cannot drift apart."""

from mmdiff_cache.backbones.registry import BACKBONES
from mmdiff_cache.datasets.registry import DATASETS
from pipelines import scenes


def test_stage_one_is_what_extract_does_by_default() -> None:
    config, entry = scenes.extract(), DATASETS["scenes"]
    backbone = BACKBONES[entry.backbone]
    assert config.backbone == entry.backbone
    assert config.splits == tuple(entry.splits)
    assert config.concepts == entry.concepts
    assert config.layers == backbone.layers
    assert config.timesteps == backbone.timesteps
    assert config.prompts == "empty"


def test_stage_two_reads_what_stage_one_stores() -> None:
    stored, trained = scenes.extract(), scenes.train()
    assert stored.layers is not None
    assert stored.timesteps is not None
    assert set(trained.layers or ()) <= set(stored.layers)
    assert set(trained.timesteps or ()) <= set(stored.timesteps)
