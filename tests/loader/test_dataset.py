"""The loader hands over what the store holds, reads no more than it must, and shuffles so that a training can
go on.
"""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mmdiff_cache.errors import ConfigError, DamageError, StoreIncomplete
from mmdiff_cache.loader import (
    Batch,
    CachedFeatureDataset,
    SampleMemory,
    batch_positions,
    batches_per_epoch,
    make_loader,
    sample_order,
)
from mmdiff_cache.store.reader import open_store
from tests.learnable import (
    CHANNELS,
    GRID,
    LAYERS,
    PATCH,
    TIMESTEPS,
    VOCABULARIES,
    expected_maps,
    make_schema,
    write_store,
)

SIDE = GRID * PATCH


def test_a_sample_is_what_the_store_holds(learnable_store: Path) -> None:
    data = CachedFeatureDataset(
        learnable_store,
        split="test",
        layers=["single.5", "single.1"],
        timesteps=[0.26],
        concepts="depth",
        labels=("segmentation", "depth"),
    )
    reader = open_store(learnable_store)["test"]
    item = data[3]
    assert len(data) == 4
    assert item["hidden_states"].dtype == torch.float16
    assert item["hidden_states"].shape == (1, 2, GRID, GRID, CHANNELS)
    for place, layer in enumerate(["single.5", "single.1"]):
        np.testing.assert_array_equal(item["hidden_states"][0, place], reader.read(3, 0.26, layer))
    np.testing.assert_array_equal(item["segmentation"], reader.labels("segmentation", [3])[0])
    np.testing.assert_array_equal(item["depth"], reader.labels("depth", [3])[0])
    assert item["segmentation"].dtype == torch.int64
    assert item["depth"].dtype == torch.float32
    assert item["concepts"].shape == (2, GRID, GRID)
    assert int(item["index"]) == 3


def test_a_batch_is_its_samples(learnable_store: Path) -> None:
    data = CachedFeatureDataset(
        learnable_store, concepts="saliency", labels=("saliency",), indices=[7, 2, 11]
    )
    batch = data.batch([2, 0])
    assert batch.indices.tolist() == [11, 7]
    assert batch.ids == ("blocks-train-000011", "blocks-train-000007")
    for row, position in enumerate([2, 0]):
        item = data[position]
        assert torch.equal(batch.hidden_states[row], item["hidden_states"])
        assert batch.concepts is not None
        assert torch.equal(batch.concepts[row], item["concepts"])
        assert torch.equal(batch.targets["saliency"][row], item["saliency"])


@pytest.mark.parametrize("vocabulary", list(VOCABULARIES))
def test_concept_maps_over_all_timesteps_are_the_stored_ones(learnable_store: Path, vocabulary: str) -> None:
    data = CachedFeatureDataset(learnable_store, concepts=vocabulary)
    maps = data.batch(range(5)).concepts
    assert maps is not None
    np.testing.assert_allclose(maps, data.reader.concept_maps(vocabulary, range(5)), atol=1e-6)
    np.testing.assert_allclose(maps.sum(dim=1), 1, atol=1e-5)


def test_concept_maps_are_averaged_over_the_chosen_timesteps_alone(learnable_store: Path) -> None:
    chosen = TIMESTEPS[1:]
    data = CachedFeatureDataset(learnable_store, timesteps=chosen, concepts="segmentation")
    maps = data.batch([4]).concepts
    assert maps is not None
    scores = data.reader.concept_scores("segmentation", [4], chosen)
    vocabulary = next(v for v in data.store.manifest.schema.vocabularies if v.name == "segmentation")
    np.testing.assert_allclose(maps, expected_maps(scores[:, None], vocabulary)[:, 0], atol=1e-6)
    assert not np.allclose(maps, data.reader.concept_maps("segmentation", [4]), atol=1e-3)


def bytes_read() -> int:
    """Bytes that this process has asked the system to read so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def test_only_the_chunks_asked_for_are_read(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", train=4, test=1, schema=make_schema(channels=2048))
    one = CachedFeatureDataset(store, layers=LAYERS[1:2], timesteps=TIMESTEPS[:1])
    everything = CachedFeatureDataset(store)
    costs = []
    for data in (one, everything):
        data.batch([0])  # opens arrays
        before = bytes_read()
        data.batch([1, 2])
        costs.append(bytes_read() - before)
    raw = 2 * GRID * GRID * 2048 * 2
    assert costs[0] < 1.1 * raw
    assert costs[1] > 5 * costs[0]


def test_sources_stand_in_for_the_features(learnable_store: Path) -> None:
    reader = open_store(learnable_store)["train"]
    latents = CachedFeatureDataset(learnable_store, source="latents").batch([1, 2])
    images = CachedFeatureDataset(learnable_store, layers=LAYERS[:1], source="images").batch([1, 2])
    assert latents.hidden_states.shape == (2, 1, len(LAYERS), GRID, GRID, 4)
    for layer in range(len(LAYERS)):
        np.testing.assert_array_equal(latents.hidden_states[:, 0, layer], reader.latents([1, 2]))
    assert images.hidden_states.shape == (2, 1, 1, SIDE, SIDE, 3)
    restored = (images.hidden_states[:, 0, 0] + 1) * 127.5
    np.testing.assert_allclose(restored, reader.images([1, 2]), atol=1e-3)


def test_torch_loader_takes_it(learnable_store: Path) -> None:
    data = CachedFeatureDataset(learnable_store, layers=LAYERS[:1], labels=("depth",))
    batch = next(iter(DataLoader(data, batch_size=5)))
    assert batch["hidden_states"].shape == (5, len(TIMESTEPS), 1, GRID, GRID, CHANNELS)
    assert batch["depth"].shape == (5, SIDE, SIDE)


def positions(batches: list[Batch]) -> list[list[int]]:
    return [batch.indices.tolist() for batch in batches]


def test_every_epoch_is_another_shuffle_of_the_whole_split(learnable_store: Path) -> None:
    data = CachedFeatureDataset(learnable_store, layers=LAYERS[:1], timesteps=TIMESTEPS[:1])
    epochs = [positions(list(make_loader(data, 5, seed=3, start=4 * epoch))) for epoch in range(3)]
    orders = [list(chain.from_iterable(epoch)) for epoch in epochs]
    for order in orders:
        assert sorted(order) == list(range(16))
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != list(chain.from_iterable(positions(list(make_loader(data, 5, seed=4)))))
    assert [len(batch) for batch in epochs[0]] == [5, 5, 5, 1]


def test_the_order_depends_on_nothing_but_seed_and_epoch(learnable_store: Path) -> None:
    data = CachedFeatureDataset(learnable_store, layers=LAYERS[:1], timesteps=TIMESTEPS[:1])
    whole = positions(list(make_loader(data, 5, seed=3, drop_last=True, steps=11)))
    assert (
        positions(list(make_loader(data, 5, seed=3, drop_last=True, steps=11, threads=4, ahead=9))) == whole
    )
    for start in (1, 4, 7):
        rest = make_loader(data, 5, seed=3, drop_last=True, start=start, steps=11 - start)
        assert positions(list(rest)) == whole[start:]
    assert all(len(batch) == 5 for batch in whole)


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 6),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
    drop_last=st.booleans(),
)
@settings(deadline=None)
def test_ranks_divide_what_one_process_would_see(
    count: int, batch_size: int, world_size: int, epoch: int, drop_last: bool
) -> None:
    together = batch_size * world_size
    per_epoch = batches_per_epoch(count, together, drop_last=drop_last)
    seen: list[int] = []
    for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
        how = {"seed": 1, "shuffle": True, "drop_last": drop_last}
        alone = batch_positions(step, count, together, **how).tolist()
        shares = [
            batch_positions(step, count, batch_size, **how, rank=rank, world_size=world_size).tolist()
            for rank in range(world_size)
        ]
        assert sorted(chain.from_iterable(shares)) == sorted(alone)
        assert all(len(share) <= batch_size for share in shares)
        if drop_last and count >= together:
            assert {len(share) for share in shares} == {batch_size}
        seen += alone
    assert len(set(seen)) == len(seen)
    if not drop_last:
        assert sorted(seen) == list(range(count))


def test_each_rank_loads_its_share_and_goes_on_in_mid_epoch(learnable_store: Path) -> None:
    """16 samples, 3 ranks, 2 a batch: two full steps of 6, then 4 samples for ranks 0 to 2."""
    data = CachedFeatureDataset(learnable_store, layers=LAYERS[:1], timesteps=TIMESTEPS[:1])
    ranks = [positions(list(make_loader(data, 2, seed=3, rank=rank, world_size=3))) for rank in range(3)]
    assert [[len(batch) for batch in rank] for rank in ranks] == [[2, 2, 2], [2, 2, 1], [2, 2, 1]]
    assert sorted(chain.from_iterable(chain.from_iterable(ranks))) == list(range(16))
    rest = make_loader(data, 2, seed=3, rank=1, world_size=3, start=1, steps=3)
    next_epoch = make_loader(data, 2, seed=3, rank=1, world_size=3, start=3)
    assert positions(list(rest)) == [*ranks[1][1:], positions(list(next_epoch))[0]]


def test_a_rank_without_a_sample_gets_no_batch(learnable_store: Path) -> None:
    data = CachedFeatureDataset(learnable_store, indices=range(7), layers=LAYERS[:1], timesteps=TIMESTEPS[:1])
    sizes = [
        [len(batch.ids) for batch in make_loader(data, 2, rank=rank, world_size=3, steps=4)]
        for rank in range(3)
    ]
    assert sizes == [[2, 1, 2, 1], [2, 2], [2, 2]]


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 2), (0, 0), (0, 17)])
def test_a_rank_that_is_none_is_refused(learnable_store: Path, rank: int, world_size: int) -> None:
    data = CachedFeatureDataset(learnable_store)
    with pytest.raises(ConfigError, match=f"got rank {rank} of {world_size}"):
        make_loader(data, 2, rank=rank, world_size=world_size)


@pytest.mark.parametrize("memory", [0, 3000, 1 << 24])
def test_batches_that_are_held_keep_their_values(learnable_store: Path, memory: int) -> None:
    """Whether they come from the store, from held samples or from both, in any epoch."""
    data = CachedFeatureDataset(learnable_store, memory=memory)
    fresh = CachedFeatureDataset(learnable_store)
    batches = list(make_loader(data, 3, seed=5, steps=14))
    for batch in batches:
        expected = fresh.reader.hidden_states(batch.indices.tolist())
        np.testing.assert_array_equal(batch.hidden_states, expected)


def test_a_pass_takes_memory_for_a_few_batches_only(learnable_store: Path) -> None:
    data = CachedFeatureDataset(learnable_store, layers=LAYERS[:1])
    places = {
        batch.hidden_states.untyped_storage().data_ptr()
        for batch in make_loader(data, 1, steps=40, threads=2, ahead=2)
    }
    assert len(places) <= 2 + 3


def test_order_is_frozen() -> None:
    """Checkpoints of today must go on tomorrow with the same order."""
    assert sample_order(10, seed=0, epoch=0).tolist() == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
    assert batch_positions(3, 10, 4, seed=7, shuffle=True, drop_last=True).tolist() == [5, 0, 4, 3]


def test_a_split_smaller_than_a_batch_still_gives_one(learnable_store: Path) -> None:
    data = CachedFeatureDataset(learnable_store, indices=[0, 1, 2], layers=LAYERS[:1])
    (batch,) = make_loader(data, 8, drop_last=True)
    assert sorted(batch.indices.tolist()) == [0, 1, 2]


class Counting(CachedFeatureDataset):
    """Counts the batches that were asked for."""

    asked = 0

    def batch(self, positions, slots=None, epoch=0):  # type: ignore[no-untyped-def]
        self.asked += 1
        return super().batch(positions, slots, epoch)


def test_prefetching_is_bounded_and_stops_with_the_reader(learnable_store: Path) -> None:
    data = Counting(learnable_store, layers=LAYERS[:1], timesteps=TIMESTEPS[:1])
    loader = make_loader(data, 1, threads=2, ahead=3)
    for taken in range(1, 4):
        next(loader)
        assert data.asked <= taken + 3
    loader.close()
    assert data.asked <= 3 + 3


def test_held_samples_are_not_read_again(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", train=4, test=1)
    held = CachedFeatureDataset(store, concepts="depth", labels=("depth",), memory=1 << 20)
    fresh = CachedFeatureDataset(store, concepts="depth", labels=("depth",))
    before = held.batch(range(4))
    for shard in (store / "train.zarr" / "hidden_states").glob("c*"):
        shard.unlink()
    after = held.batch(range(4))
    assert torch.equal(before.hidden_states, after.hidden_states)
    assert torch.equal(before.targets["depth"], after.targets["depth"])
    with pytest.raises(DamageError):
        fresh.batch([0])


def test_memory_keeps_within_its_limit() -> None:
    memory = SampleMemory(limit=250)
    for sample in range(5):
        memory.put((sample, 0), {"features": np.full(100, sample, np.uint8)})
    assert memory.held_bytes == 200
    assert [memory.get((sample, 0)) is not None for sample in range(5)] == [True, True, False, False, False]


def test_failed_samples_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = write_store(tmp_path / "store", train=4, test=1, failing=("blocks-train-000001",))
    data = CachedFeatureDataset(store)
    assert data.indices == (0, 2, 3)
    assert data.batch([1]).ids == ("blocks-train-000002",)
    assert "1 failed sample(s) left out: blocks-train-000001" in caplog.text


def test_unfinished_samples_are_refused_by_name(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", train=8, test=1, stop_after=1)
    with pytest.raises(StoreIncomplete, match=r"4 of 8 samples .* first 'blocks-train-000004'.*it goes on"):
        CachedFeatureDataset(store)
    assert len(CachedFeatureDataset(store, indices=range(4))) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"split": "val"}, "split 'val' .* it has train, test"),
        ({"layers": ["single.9"]}, "layer 'single.9' .* stored: single.1, single.3, single.5"),
        ({"timesteps": [0.5]}, "timestep 0.5 .* stored: 0.78, 0.26, 0.001"),
        ({"concepts": "animals"}, "concept vocabulary 'animals' .* stored: segmentation, saliency, depth"),
        ({"labels": ("normals",)}, "label set 'normals' .* stored: segmentation"),
        ({"discriminative": ("dinov3",)}, "discriminative encoder 'dinov3' .* stored: none"),
    ],
)
def test_what_is_not_stored_is_refused_with_what_is(
    learnable_store: Path, arguments: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        CachedFeatureDataset(learnable_store, **arguments)  # type: ignore[arg-type]
