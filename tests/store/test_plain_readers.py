"""Anyone's zarr and xarray open the store without our code, without a warning, and read the same numbers."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from mmdiff_cache.config import Codec
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.writer import open_writer
from tests.store.synthetic import make_features, make_manifest, make_schema, write_store


@pytest.fixture(autouse=True)
def every_warning_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_plain_zarr_reads_the_same(finished: Path, manifest: Manifest) -> None:
    group = zarr.open_group(finished / "train.zarr", mode="r")
    features = make_features(manifest.schema, list(manifest.splits["train"]))
    np.testing.assert_array_equal(group["hidden_states"][:], features.hidden_states)
    np.testing.assert_array_equal(group["concepts/depth/scores"][:], features.concept_scores["depth"])
    np.testing.assert_array_equal(group["discriminative/dino/features"][:], features.discriminative["dino"])
    assert list(group["sample_id"][:]) == list(manifest.splits["train"])
    assert list(group["layer"][:]) == ["double.1", "single.4"]
    assert list(group["timestep"][:]) == [0.9, 0.26, 0.001]
    assert group["labels/classes/map"].attrs["classes"] == ["sky", "ground", "ball"]
    assert group["labels/classes/map"].attrs["ignore"] == 255
    assert group.attrs["noise"]["x_t"] == "x_t = (1 - t) x_0 + t eps"


def test_plain_xarray_reads_the_same(finished: Path, manifest: Manifest) -> None:
    features = make_features(manifest.schema, list(manifest.splits["train"]))
    with xarray.open_zarr(finished / "train.zarr", consolidated=False) as dataset:
        hidden = dataset["hidden_states"]
        assert hidden.dims == ("sample", "variant", "timestep", "layer", "height", "width", "channel")
        assert {"sample_id", "noise_draw", "flipped", "timestep", "layer", "statistic"} <= set(dataset.coords)
        chosen = hidden.sel(timestep=0.26, layer="single.4").isel(sample=2, variant=1)
        np.testing.assert_array_equal(chosen.values, features.hidden_states[2, 1, 1, 1])
        assert dataset["images"].dtype == np.uint8
        assert dataset["images"].dims == ("sample", "image_height", "image_width", "rgb")
        rms = dataset["audit"].sel(statistic="rms").values
        np.testing.assert_array_equal(rms, features.audit[..., 1])
    path = finished / "train.zarr"
    with xarray.open_zarr(path, group="concepts/scenes", consolidated=False) as concepts:
        np.testing.assert_array_equal(
            concepts["maps"].sel(concept="ball").values, features.concept_maps["scenes"][:, :, 1]
        )
    with xarray.open_zarr(path, group="labels/depth", consolidated=False) as labels:
        assert labels["map"].dtype == np.float32
        assert labels["map"].attrs["units"] == "metre"


def test_xarray_opens_all_groups_as_one_tree(finished: Path) -> None:
    with xarray.open_datatree(finished / "train.zarr", engine="zarr", consolidated=False) as tree:
        dino = tree["discriminative/dino"]["features"]
        assert dino.dims == ("sample", "variant", "dino_layer", "dino_height", "dino_width", "dino_channel")
        assert dino.sel(dino_layer="4").shape == (6, 2, 1, 2, 5), "not the layers of the hidden states"
        assert set(tree["concepts"].children) == {"scenes", "depth"}
        assert set(tree["labels"].children) == {"classes", "depth", "salient"}
        scores = tree["concepts/scenes"]["scores"].sel(timestep=0.26, block="double.1", concept="ball")
        assert scores.shape == (6, 2, 2, 3)


@pytest.mark.parametrize(
    ("codec", "cname", "level", "shuffle"), [("zstd", "zstd", 1, "shuffle"), ("fast", "lz4", 5, "bitshuffle")]
)
def test_metadata_is_what_the_specification_says(
    tmp_path: Path, codec: Codec, cname: str, level: int, shuffle: str
) -> None:
    open_writer(tmp_path / "s", make_manifest(make_schema(codec=codec))).close()
    for path, size in (("hidden_states", 2), ("latents", 4), ("images", 1), ("labels/depth/original", 4)):
        text = json.loads((tmp_path / "s" / "train.zarr" / path / "zarr.json").read_text())
        assert text["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
        (shard,) = text["codecs"]
        assert shard["name"] == "sharding_indexed"
        assert shard["configuration"]["index_location"] == "end"
        assert [c["name"] for c in shard["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
        *_, blosc, crc = shard["configuration"]["codecs"]
        assert blosc == {
            "name": "blosc",
            "configuration": {
                "typesize": size, "cname": cname, "clevel": level, "shuffle": shuffle, "blocksize": 262144
            },
        }  # fmt: skip
        assert crc["name"] == "crc32c"
    hidden = json.loads((tmp_path / "s/train.zarr/hidden_states/zarr.json").read_text())
    assert hidden["fill_value"] == "NaN"
    assert "consolidated_metadata" not in json.loads((tmp_path / "s/train.zarr/zarr.json").read_text())


def test_groups_hold_nothing_foreign(finished: Path) -> None:
    for group in finished.glob("*.zarr"):
        for file in group.rglob("*"):
            assert file.is_dir() or file.name == "zarr.json" or file.name.startswith("c."), file


def test_the_store_needs_no_torch() -> None:
    script = (
        "import sys, mmdiff_cache.store.writer, mmdiff_cache.store.reader, mmdiff_cache.store.summary\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'dask', 'xarray'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_store_opened_while_it_is_written_shows_what_was_finished_then(finished: Path) -> None:
    assert open_store(finished).disk_bytes == sum(
        file.stat().st_size
        for group in finished.glob("*.zarr")
        for file in group.rglob("*")
        if file.is_file()
    )


def test_plain_tensorstore_reads_the_same(finished: Path, manifest: Manifest) -> None:
    features = make_features(manifest.schema, list(manifest.splits["train"]))
    for path, truth in (
        ("hidden_states", features.hidden_states),
        ("concepts/scenes/scores", features.concept_scores["scenes"]),
        ("discriminative/dino/features", features.discriminative["dino"]),
        ("latents", features.latents),
        ("audit", features.audit),
    ):
        kvstore = {"driver": "file", "path": str(finished / "train.zarr" / path)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
        np.testing.assert_array_equal(array.read().result(), truth)


def test_int8_is_one_multiplication_for_xarray(tmp_path: Path) -> None:
    manifest = make_manifest(make_schema(codec="int8"))
    write_store(tmp_path / "s", manifest)
    with xarray.open_zarr(tmp_path / "s" / "train.zarr", consolidated=False) as dataset:
        values = dataset["hidden_states"] * dataset["hidden_states_scale"]
        chosen = values.sel(timestep=0.26, layer="single.4").isel(sample=2, variant=1)
        ours = open_store(tmp_path / "s")["train"].read(2, 0.26, "single.4", variant=1)
        np.testing.assert_array_equal(chosen.values.astype(np.float16), ours)
