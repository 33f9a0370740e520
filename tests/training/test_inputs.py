"""Every switch of what a training reads: resolved in full, trained, gone on with bit for bit, evaluated."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdiff_cache.cli.app import run as command
from mmdiff_cache.config import ConceptMapsConfig, TrainConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.models.mmdiff import MMDiff, ModelSpec
from mmdiff_cache.store.convert import Selection, convert, plan_conversion
from mmdiff_cache.training.baselines import TRAINED, trained_config
from mmdiff_cache.training.build import build_model, fit_standardisation, set_up
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.resolve import resolve
from mmdiff_cache.training.run import load_run, model_for_run, train
from tests.learnable import CHANNELS, LAYERS, MAP_BLOCKS, TIMESTEPS, make_rich_schema, write_store
from tests.training.conftest import small_config
from tests.training.test_run import Stop, assert_same, stop_at


@pytest.fixture(scope="module")
def rich_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training samples in four variants, with attention maps and an encoder."""
    return write_store(tmp_path_factory.mktemp("stores") / "rich", train=12, schema=make_rich_schema())


SWITCHES: Mapping[str, Mapping[str, Any]] = {
    "augment": {},
    "one draw": {"variants": (0,)},
    "stack": {"variant_use": "stack"},
    "repeated": {"timesteps": (0.26, 0.26, 0.26)},
    "attention": {"concepts": "cross_attention"},
    "maps": {
        "concepts": "depth",
        "concept_maps": ConceptMapsConfig(
            blocks=("double.1",), temperature=2.0, reading="mean_then_softmax", timesteps=(0.78,)
        ),
    },
    "shuffled": {"concept_maps": ConceptMapsConfig(shuffled=True)},
    "alone": {"source": "discriminative", "discriminative": ("eyes",)},
    "standardised": {"standardise": True, "drop_channels": (5, 17), "discriminative": ("eyes",)},
    "latents": {"source": "latents", "standardise": True, "aggregator": None},
}


def config_of(store: Path, run: Path | None, name: str, **changes: Any) -> TrainConfig:
    values = {**SWITCHES[name], **changes}
    if values.get("aggregator", 0) is None:
        del values["aggregator"]
    return small_config(store, run, **{"steps": 6, **values})


@pytest.mark.parametrize("name", SWITCHES)
def test_it_trains_goes_on_exactly_and_is_evaluated(rich_store: Path, tmp_path: Path, name: str) -> None:
    """Six steps of four are more than two epochs of the samples that are not held out."""
    whole = train(config_of(rich_store, tmp_path / "whole", name))
    broken = config_of(rich_store, tmp_path / "broken", name)
    for step in (1, 4):
        with pytest.raises(Stop):
            train(broken, progress=stop_at(step))
    assert_same(whole, train(broken))
    assert resolve(whole.config) == whole.config
    config = whole.config
    assert None not in (config.variants, config.layers, config.timesteps, config.concepts)
    if config.concepts != "none":
        assert None not in (config.concept_maps.blocks, config.concept_maps.timesteps)
    assert evaluate(whole).samples == 4
    assert load_run(whole.path).config == config


def test_augmentation_changes_what_is_learnt_and_its_seed_too(rich_store: Path, tmp_path: Path) -> None:
    weights = [
        model_for_run(train(small_config(rich_store, tmp_path / str(n), steps=2, **how)), "raw").state_dict()
        for n, how in enumerate(({}, {"variants": (0,)}, {"variants": (0, 2)}))
    ]
    heads = [found["decoder.head.weight"] for found in weights]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])


def test_evaluation_needs_no_variant_but_the_plain_one(rich_store: Path, tmp_path: Path) -> None:
    run = train(small_config(rich_store, tmp_path / "run", steps=2))
    smaller = convert(plan_conversion(rich_store, tmp_path / "small", Selection(variants=[0])))
    assert evaluate(run, store=smaller.path).scores == evaluate(run).scores


def test_what_is_left_open_is_filled(rich_store: Path) -> None:
    config = resolve(small_config(rich_store, timesteps=(0.001, 0.26, 0.26)))
    assert config.variants == (0, 1, 2, 3)
    assert config.timesteps == (0.26, 0.26, 0.001)
    assert config.concept_maps == ConceptMapsConfig(blocks=MAP_BLOCKS, timesteps=(0.26, 0.001))
    assert resolve(small_config(rich_store, variant_use="stack")).variants == (0, 1)
    assert resolve(small_config(rich_store, source="latents")).variants == (0,)
    alone = resolve(small_config(rich_store, source="discriminative", discriminative=("eyes",)))
    assert alone.layers == ("2", "11")


def test_the_model_fits_what_is_read(rich_store: Path) -> None:
    def spec(**how: Any) -> ModelSpec:
        found = set_up(resolve(small_config(rich_store, **how))).spec
        assert isinstance(found, ModelSpec)
        return found

    stacked = spec(variant_use="stack")
    assert (stacked.timesteps, stacked.cleanest) == (6, 2)
    repeated = spec(timesteps=(0.78, 0.001, 0.001))
    assert (repeated.timesteps, repeated.cleanest) == (3, 1)
    alone = spec(source="discriminative", discriminative=("eyes",))
    assert (alone.timesteps, alone.layers, alone.channels) == (1, 2, 24)
    assert (alone.grid, alone.patch, alone.discriminative, alone.concepts) == ((2, 2), 16, (), 3)
    assert spec(concepts="cross_attention").concepts == 2


def test_standardised_features_have_mean_0_and_deviation_1(rich_store: Path) -> None:
    """Per channel of every timestep and layer, over the samples that were measured; dropped ones are gone."""
    config = resolve(small_config(rich_store, standardise=True, drop_channels=(3, 0), variants=(1, 2)))
    setup = set_up(config)
    samples = setup.parts[0].samples
    model = build_model(setup.spec)
    assert isinstance(model, MMDiff)
    fit_standardisation(model, [samples])
    stored = samples.reader.hidden_states(samples.indices)
    seen = model.inputs(torch.from_numpy(stored))
    assert seen.shape[-1] == CHANNELS - 2
    for values in (seen.mean(dim=(0, 3, 4)), seen.var(dim=(0, 3, 4), correction=0) - 1):
        torch.testing.assert_close(values, torch.zeros_like(values), atol=2e-5, rtol=0)
    kept = np.delete(stored.astype(np.float64), [0, 3], axis=-1)
    wanted = (kept - kept.mean(axis=(0, 3, 4), keepdims=True)) / kept.std(axis=(0, 3, 4), keepdims=True)
    np.testing.assert_allclose(seen, wanted, atol=1e-5)


def test_at_most_so_many_samples_are_measured(rich_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdiff_cache.training.build.STATISTICS_SAMPLES", 4)
    setup = set_up(resolve(small_config(rich_store, standardise=True, holdout=0.0)))
    model = build_model(setup.spec)
    assert isinstance(model, MMDiff)
    [part] = setup.parts
    fit_standardisation(model, [part.samples])
    seen = model.inputs(torch.from_numpy(part.samples.reader.hidden_states([0, 3, 6, 9])))
    torch.testing.assert_close(seen.mean(dim=(0, 3, 4)), torch.zeros(3, 3, CHANNELS), atol=2e-5, rtol=0)


def test_checkpoints_carry_the_statistics_and_nothing_where_there_are_none(
    rich_store: Path, tmp_path: Path
) -> None:
    run = train(small_config(rich_store, tmp_path / "run", standardise=True, steps=3, limit=6))
    for weights in ("raw", "ema", "best"):
        state = model_for_run(run, weights).state_dict()
        assert state["inputs.mean"].shape == (3, 3, 1, 1, CHANNELS)
        assert (state["inputs.deviation"] > 0.5).all()
    plain = model_for_run(train(small_config(rich_store, tmp_path / "plain", steps=1)))
    assert not any(name.startswith("inputs") for name in plain.state_dict())


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("baseline", TRAINED, ids=lambda entry: entry.source)
def test_baselines_of_any_run_can_be_resolved(rich_store: Path, tmp_path: Path, name: str, baseline) -> None:
    config = resolve(trained_config(baseline, resolve(config_of(rich_store, None, name)), tmp_path))
    assert (config.variants, config.standardise, config.concepts) == ((0,), False, "none")
    assert config.layers == LAYERS


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        ("drop_channels=32", "drop_channels must lie between 0 and 31, .* hidden_states, got 32"),
        ("drop_channels=-1", "counted from 0, got -1"),
        ("variants=0,7", "variant 7 is not in"),
        ("variants=0,x", "variants must be int, got 'x'"),
        ("variant_use=mix", "variant_use must be one of augment, stack"),
        ("concepts=animals", "'animals' .* stored: segmentation, saliency, depth"),
        ("concept_maps.blocks=double.7", "block of segmentation 'double.7'"),
        ("concept_maps.reading=mean", "reading must be one of"),
        ("source=discriminative", "exactly one encoder, got 0"),
    ],
)
def test_bad_choices_end_in_one_line(
    rich_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], assignments: str, says: str
) -> None:
    arguments = ["train", "--task", "segmentation", "--store", str(rich_store), "--run", str(tmp_path / "r")]
    assert command([*arguments, "--set", assignments]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert re.search(says, shown)
    assert not (tmp_path / "r").exists()


def test_some_channels_stay(rich_store: Path) -> None:
    with pytest.raises(ConfigError, match="names all 4 channels of latents"):
        resolve(small_config(rich_store, source="latents", drop_channels=(0, 1, 2, 3)))
    with pytest.raises(ConfigError, match="below the backbone's 16 channels"):
        set_up(resolve(small_config(rich_store, drop_channels=tuple(range(16)))))


def test_pictures_are_not_standardised(rich_store: Path) -> None:
    with pytest.raises(ConfigError, match="leave out standardise"):
        resolve(small_config(rich_store, source="images", standardise=True))


def test_the_command_line_sets_every_switch(rich_store: Path, tmp_path: Path) -> None:
    choices = [
        "concept_maps.temperature=0.5", "concept_maps.blocks=double.1", "variants=0,1", "timesteps=0.26,0.26",
        "drop_channels=[4]", "standardise=true", "decoder=linear", "aggregator.width=16", "steps=1",
        "batch_size=2", "limit=4", "subset_seed=3", "aggregator.heads=2",
    ]  # fmt: skip
    arguments = ["train", "--task", "depth", "--store", str(rich_store), "--run", str(tmp_path / "run")]
    assert command([*arguments, *(word for choice in choices for word in ("--set", choice))]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["variants"] == [0, 1]
    assert config["timesteps"] == [TIMESTEPS[1]] * 2
    assert config["concept_maps"] == {
        "blocks": ["double.1"],
        "timesteps": [TIMESTEPS[1]],
        "temperature": 0.5,
        "reading": "softmax_then_mean",
        "shuffled": False,
    }
    assert (config["drop_channels"], config["subset_seed"]) == ([4], 3)
