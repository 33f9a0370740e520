"""Every switch of what a training reads: resolved in full, trained, gone on with bit for bit, evaluated."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdiff_cache.cli.app import run as command
from mmdiff_cache.config import ConceptMapsConfig, TrainConfig
from mmdiff_cache.errors import CheckpointError, ConfigError
from mmdiff_cache.models.mmdiff import MMDiff, ModelSpec
from mmdiff_cache.store.convert import Selection, convert, plan_conversion
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.schema import Vocabulary
from mmdiff_cache.training.baselines import TRAINED, trained_config
from mmdiff_cache.training.build import build_model, fit_standardisation, set_up
from mmdiff_cache.training.evaluate import evaluate
from mmdiff_cache.training.plan import plan
from mmdiff_cache.training.resolve import resolve
from mmdiff_cache.training.run import load_run, model_for_run, store_of, train
from tests.learnable import (
    BLOCKS,
    CHANNELS,
    LAYERS,
    MAP_BLOCKS,
    TIMESTEPS,
    VOCABULARIES,
    make_rich_schema,
    make_schema,
    write_store,
)
from tests.training.conftest import TINY, small_config
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


@pytest.mark.parametrize("chosen", [None, ("single.9", "double.12", "single.10")])
def test_layers_go_from_shallow_to_deep(tmp_path: Path, chosen: tuple[str, ...] | None) -> None:
    """A store has them as the extraction was asked for them; decoders take the first for the shallowest."""
    schema = make_schema(layers=("single.10", "single.9", "double.12", "double.3"))
    store = write_store(tmp_path / "store", train=2, test=1, schema=schema)
    found = resolve(small_config(store, layers=chosen)).layers
    assert found == ((() if chosen else ("double.3",)) + ("double.12", "single.9", "single.10"))


def test_stores_that_differ_in_order_alone_go_together(tmp_path: Path) -> None:
    usual = make_schema()
    other = make_schema(layers=LAYERS[::-1], timesteps=TIMESTEPS[::-1])
    stores = tuple(
        str(write_store(tmp_path / name, train=2, test=1, schema=schema))
        for name, schema in (("a", usual), ("b", other))
    )
    config = resolve(small_config(Path(stores[0]), task="segmentation+depth", stores=stores, holdout=0.0))
    assert (config.layers, config.timesteps) == (LAYERS, TIMESTEPS)
    features = [one.samples.batch([0]).hidden_states for one in set_up(config).parts]
    there = open_store(stores[1])["train"].hidden_states([0])
    assert features[0].shape == features[1].shape
    assert np.array_equal(features[1], there[:, ::-1, ::-1])


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
    assert (alone.grid, alone.patch, alone.discriminative, alone.concepts) == ((2, 2), 16, (), 0)
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
        ("discriminative=null", "discriminative must be a list, got None"),
        ("aggregator=5", "aggregator is a group of fields, kind, preset, .*; got 5"),
        ("ema=null", "ema is a group of fields, beta, warmup; got None"),
        ("seed=-1", "seed must be 0 to .*, got -1"),
        ("order_seed=-3", "order_seed must be 0 to .*, got -3"),
        ("weight_decay=-0.1", "weight_decay must not be negative, got -0.1"),
        ("decoder_rate=NaN", "decoder_rate must not be negative, got nan"),
        ("learning_rate=Infinity", "learning_rate must be positive, got inf"),
        ("loss_weights=2", "loss_weights is of several tasks, got one"),
        ("mixing=[1]", "mixing is of several tasks, got one"),
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


@pytest.mark.parametrize("layers", ["11", "[11]", "[2, 11]", '["11"]', "2,11"])
def test_blocks_that_are_numbers_may_be_given_as_such(rich_store: Path, layers: str) -> None:
    config = small_config(rich_store, source="discriminative", discriminative=("eyes",))
    chosen = resolve(config.override({"layers": layers})).layers
    assert chosen == (("2", "11") if "2" in layers else ("11",))


def test_an_encoder_alone_has_no_concept_maps_unless_they_are_asked_for(rich_store: Path) -> None:
    """Paper: Tab. 4, row DINO-v3. Maps are the transformer's."""
    for task in ("segmentation", "segmentation+depth"):
        config = small_config(rich_store, task=task, source="discriminative", discriminative=("eyes",))
        assert resolve(config).concepts == "none"
        assert resolve(replace(config, concepts="depth")).concepts == "depth"


def test_several_tasks_learn_from_latents_as_one_does(rich_store: Path) -> None:
    """The vocabulary that several tasks share is none of a choice that uses nothing of the transformer."""
    config = resolve(small_config(rich_store, task="segmentation+depth", source="latents"))
    assert config.concepts == "none"
    set_up(config)


def test_a_preset_that_would_decide_nothing_is_refused(rich_store: Path, tmp_path: Path) -> None:
    """A run's own config.json has every field filled; another preset on top of it would change nothing."""
    run = train(small_config(rich_store, tmp_path / "run", steps=1))
    written = TrainConfig.from_json(json.loads((run.path / "config.json").read_text()))
    again = {"aggregator.preset": "section_3_1", "run": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match=r"section_3_1 would decide nothing: layer_scale, norm, .*=null"):
        resolve(written.override(again))
    fields = ("layer_scale", "norm", "skip", "cbam", "weights_on")
    left_open = {f"aggregator.{name}": "null" for name in fields}
    assert resolve(written.override({**again, **left_open})).aggregator.norm == "after_projection"
    kept = resolve(written.override({**again, **left_open, "aggregator.skip": "gated"})).aggregator
    assert (kept.skip, kept.cbam) == ("gated", "before_skip")


def test_the_plan_says_what_is_read_and_built(rich_store: Path) -> None:
    def said(**changes: Any) -> dict[str, str]:
        lines = str(plan(small_config(rich_store, **changes))).splitlines()
        return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}

    where = f"from {rich_store}"
    usual = said(discriminative=("eyes",))
    assert usual["features"] == (
        "3 layers x 3 timesteps of flux-tiny, one of 4 variants an epoch, concepts segmentation, eyes, "
        f"{where}"
    )
    assert usual["model"] == "aggregator token (appendix_f) 16 wide, decoder linear"
    assert usual["steps"] == "12 of 4 (4.8 passes), 10 checks, float32 on cpu"
    small = said(batch_size=64, steps=3)
    assert small["steps"] == "3 of 64, or all that there are (3.0 passes), 3 checks, float32 on cpu"
    one = said(
        layers=("single.1",), timesteps=(0.26,), variants=(0,), steps=1, decoder="dpt", standardise=True,
        drop_channels=(3,), aggregator=replace(TINY, kind="none"),
        concept_maps=ConceptMapsConfig(timesteps=(0.78, 0.26), shuffled=True),
    )  # fmt: skip
    assert one["features"] == (
        "1 layer x 1 timestep of flux-tiny, 1 channel dropped, standardised, concepts segmentation at "
        f"t = 0.78, 0.26 of other samples, {where}"
    )
    assert one["model"] == "aggregator none 16 wide, decoder dpt 16 wide"
    assert one["steps"].endswith("1 check, float32 on cpu")
    stacked = said(variant_use="stack", concepts="none")["features"]
    assert stacked == f"3 layers x 3 timesteps x 2 draws of flux-tiny, {where}"
    alone = said(source="discriminative", discriminative=("eyes",), variants=(0,))["features"]
    assert alone == f"2 layers of eyes alone, {where}"
    assert said(source="latents")["features"] == f"none: the latents in their place, {where}"
    assert said(source="images")["model"] == "a small U-Net on the pictures"


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


def test_a_store_with_other_concepts_of_the_same_name_is_another_one(tmp_path: Path) -> None:
    """As many, so that the model would fit, yet each map of something else."""
    store = write_store(tmp_path / "store", train=4, test=1)
    config = small_config(store, tmp_path / "run", steps=4, holdout=0.0)
    with pytest.raises(Stop):
        train(config, stop_at(3))
    store.rename(tmp_path / "former")
    others = tuple(
        Vocabulary(name=name, concepts=words[::-1], blocks=BLOCKS, map_blocks=MAP_BLOCKS)
        for name, words in VOCABULARIES.items()
    )
    write_store(store, train=4, test=1, schema=make_schema(vocabularies=others))
    with pytest.raises(CheckpointError, match="vocabulary segmentation is object, background, edges, that"):
        train(config)
    with pytest.raises(CheckpointError, match="trained with vocabulary segmentation object, background"):
        evaluate(tmp_path / "run")
    assert store_of(load_run(tmp_path / "run"), tmp_path / "former").path == tmp_path / "former"
