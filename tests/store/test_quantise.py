"""The lossy tier: how far off, what it costs nobody, and what anyone's reader makes of it."""

from pathlib import Path

import numpy as np
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mmdiff_cache.store.quantise import quantise, restore, round_trip
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.verify import verify
from tests.store.synthetic import make_features, make_manifest, make_schema, write_store

maps = arrays.arrays(
    np.float16,
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)),
    elements=st.floats(-65504, 65504, width=16),
)


@settings(max_examples=100, deadline=None)
@given(maps)
def test_no_value_is_off_by_more_than_half_a_step_of_its_channel(values: np.ndarray) -> None:
    steps, scale = quantise(values)
    out = np.empty_like(values)
    restore(steps, scale, out)
    wide, back = values.astype(np.float64), out.astype(np.float64)
    rounding = np.maximum(np.abs(wide) * 2.0**-10, 2.0**-24)  # of the product to float16
    assert (np.abs(back - wide) <= scale.astype(np.float64) * 0.5001 + rounding).all()
    assert np.abs(steps.astype(int)).max() <= 127
    np.testing.assert_array_equal(round_trip(values[None])[0], out)


def test_a_huge_channel_costs_the_others_nothing() -> None:
    values = np.random.default_rng(0).standard_normal((8, 8, 4)).astype(np.float16)
    huge = values.copy()
    huge[..., 2] *= 4000
    np.testing.assert_array_equal(round_trip(huge)[..., [0, 1, 3]], round_trip(values)[..., [0, 1, 3]])
    error = np.linalg.norm(round_trip(values).astype(float) - values) / np.linalg.norm(values.astype(float))
    assert 1e-3 < error < 0.015


def test_plain_zarr_reads_it_with_one_multiplication(tmp_path: Path) -> None:
    manifest = make_manifest(make_schema(codec="int8"))
    write_store(tmp_path / "s", manifest)
    group = zarr.open_group(tmp_path / "s" / "train.zarr", mode="r")
    steps, scale = np.asarray(group["hidden_states"][:]), np.asarray(group["hidden_states_scale"][:])
    assert steps.dtype == np.int8
    plain = (steps * scale[..., None, None, :]).astype(np.float16)
    reader = open_store(tmp_path / "s")["train"]
    for variant in range(2):
        ours = reader.hidden_states(range(6), variant=variant)
        np.testing.assert_array_equal(ours, plain[:, variant])
    given_values = make_features(manifest.schema, list(manifest.splits["train"])).hidden_states
    np.testing.assert_allclose(plain.astype(float), given_values.astype(float), atol=0.02)
    assert verify(tmp_path / "s").sound


def test_a_scale_that_was_changed_is_damage(tmp_path: Path) -> None:
    write_store(tmp_path / "s", make_manifest(make_schema(codec="int8")))
    shard = next((tmp_path / "s/train.zarr/hidden_states_scale").glob("c.*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    found = verify(tmp_path / "s")
    assert not found.sound
    assert "hidden_states_scale" in str(found)
