"""The stores of a table: all that is read, in no more maps than apart, and none made twice."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmdiff_cache.config import AggregatorConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.experiments.needs import Need, fewest, needs_of, store_for
from mmdiff_cache.experiments.stores import Absence, finished_store, plan_store
from mmdiff_cache.experiments.world import CLEAREST, World, make_world
from mmdiff_cache.extraction.run import extract

LAYERS = ("double.0", "double.1", "single.0", "single.1", "single.2")
NEEDS = st.builds(
    Need,
    dataset=st.sampled_from(("voc", "duts")),
    backbone=st.sampled_from(("flux-dev", "sd35-large")),
    layers=st.frozensets(st.sampled_from(LAYERS), min_size=1),
    timesteps=st.frozensets(st.sampled_from((0.78, 0.52, 0.26, 0.001)), min_size=1),
    draws=st.integers(1, 3),
    vocabularies=st.frozensets(st.sampled_from(("depth", "saliency"))),
    encoders=st.frozensets(st.just("dinov3-vitb16")),
    cross_attention=st.booleans(),
)


@given(st.lists(NEEDS, max_size=6))
def test_everything_is_held_in_no_more_maps_than_apart(needs: list[Need]) -> None:
    stores = fewest(needs)
    places = {store: Path(str(number)) for number, store in enumerate(stores)}
    assert all(store_for(need, places) is not None for need in needs)
    assert sum(store.maps for store in stores) <= sum(need.maps for need in set(needs))
    assert fewest(reversed([*needs, *needs])) is not None


def test_one_timestep_of_other_layers_is_stored_apart() -> None:
    """Joined, four double-stream blocks at one t would be stored at all four."""
    world = make_world()
    double = needs_of(world.training("depth", timesteps=CLEAREST, layers=world.double_layers), world)
    single = needs_of(world.training("depth", timesteps=CLEAREST), world)
    four = needs_of(world.training("depth"), world)
    stores = fewest([*double, *single, *four])
    assert sorted(store.maps for store in stores) == [4, 16]


def test_a_training_says_what_it_reads(small: World) -> None:
    (need,) = needs_of(small.training("depth", discriminative=(small.encoder_name,)), small)
    assert (need.vocabularies, need.encoders) == ({"depth"}, {small.encoder})
    together = needs_of(small.together("segmentation", "depth"), small)
    assert [need.vocabularies for need in together] == [{"unified"}, {"unified"}]
    (cross,) = needs_of(small.training("depth", concepts="cross_attention"), small)
    assert cross.cross_attention
    assert not cross.vocabularies
    (stacked,) = needs_of(small.training("depth", variants=(0, 1, 2), variant_use="stack"), small)
    assert stacked.draws == 3
    (alone,) = needs_of(
        small.training(
            "depth", source="discriminative", discriminative=(small.encoder_name,), concepts="none"
        ),
        small,
    )
    assert alone.maps == 1, "an encoder needs features beside it, the least of them"
    (latents,) = needs_of(small.training("depth", source="latents", concepts="none"), small)
    assert needs_of(small.training("depth"), small)[0].holds(latents), "what its configuration names"
    same = needs_of(small.training("depth", aggregator=AggregatorConfig(kind="mean")), small)
    assert same == needs_of(small.training("depth"), small)


def test_what_cannot_be_read_is_refused(small: World) -> None:
    with pytest.raises(ConfigError, match="concepts 'nonesuch' are not known"):
        needs_of(small.training("depth", concepts="nonesuch"), small)
    with pytest.raises(ConfigError, match=r"layer single\.9 is not a block"):
        needs_of(small.training("depth", layers=("single.9",)), small)


def test_what_is_not_here_is_told_as_extract_tells_it(small: World) -> None:
    paper = make_world(encoder=small.encoder)
    (need,) = needs_of(paper.training("depth"), paper)
    absence = Absence(paper, download=False)
    assert "data set 'nyu' needs the folder of its files: --data-root DIR" in str(absence.of(need))
    weights = str(absence.of(replace(need, dataset="scenes")))
    assert weights.startswith("the weights of flux-dev are not on this machine")
    assert "\n" not in weights
    encoder = replace(need, dataset="scenes", backbone=small.backbone, encoders=frozenset(("dinov3-vits16",)))
    assert "dinov3-vits16" in str(absence.of(encoder))
    assert absence.without_encoders(encoder) is None
    assert Absence(small, download=False).of(needs_of(small.training("depth"), small)[0]) is None


def test_a_store_that_holds_a_need_is_used_and_another_is_not(small: World, data: Path) -> None:
    whole = needs_of(small.training("depth", discriminative=(small.encoder_name,)), small)[0]
    first = plan_store(whole, small, ())
    assert first.store == data / "scenes" / Path(small.backbone).name
    extract(first)
    again = plan_store(whole, small, ())
    assert (again.store, again.done) == (first.store, again.total)
    less = plan_store(replace(whole, timesteps=frozenset(CLEAREST), encoders=frozenset()), small, ())
    assert (less.store, less.done) == (first.store, less.total)
    others = (
        plan_store(replace(whole, draws=2), small, ()),
        plan_store(replace(whole, vocabularies=frozenset(("voc-groups",))), small, ()),
        plan_store(whole, replace(small, limit=3), ()),
        plan_store(whole, replace(small, limit=5), ()),
        plan_store(whole, replace(small, prompts={"scenes": "scene"}), ()),
        plan_store(whole, small, {first.store}),
    )
    assert {plan.store for plan in others} == {first.store.with_name(f"{first.store.name}-2")}
    assert all(plan.done == 0 for plan in others)


def test_a_store_that_was_begun_is_finished_as_it_was_begun(small: World, data: Path) -> None:
    whole = needs_of(small.training("depth"), small)[0]
    store = extract(plan_store(whole, small, ()))
    complete = {file: file.read_bytes() for file in store.path.glob("*.zarr/**/*") if file.is_file()}
    next(store.path.glob("partitions/final*")).unlink()
    less = plan_store(replace(whole, timesteps=frozenset(CLEAREST)), small, ())
    assert less.store == store.path
    assert 0 < less.done < less.total
    assert finished_store(whole, small) is None
    extract(less)
    assert complete
    assert all(file.read_bytes() == content for file, content in complete.items())


def test_a_finished_store_needs_neither_data_nor_weights(small: World, data: Path) -> None:
    need = needs_of(small.training("depth"), small)[0]
    store = extract(plan_store(need, small, ()))
    assert finished_store(need, small) == store.path
    assert finished_store(need, replace(small, limit=3)) is None
    assert finished_store(replace(need, cross_attention=True), small) == store.path
    assert finished_store(replace(need, encoders=frozenset((small.encoder,))), small) is None
    assert finished_store(replace(need, draws=2), small) is None
    assert finished_store(need, replace(small, prompts={"scenes": "scene"})) is None
