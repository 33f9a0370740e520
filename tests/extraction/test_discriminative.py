"""A discriminative encoder beside the backbone: planned, stored, told apart, the same as without a store."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file

from mmdiff_cache.cli.app import run
from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.encoders.registry import describe_encoder, load_encoder
from mmdiff_cache.errors import BackboneError, ConfigError, StoreError
from mmdiff_cache.extraction.extractor import clamp_to_float16
from mmdiff_cache.extraction.plan import plan
from mmdiff_cache.extraction.repair import repair
from mmdiff_cache.extraction.run import extract, load_extractor
from mmdiff_cache.extraction.worker import load_batch
from mmdiff_cache.records import PreparedSample
from mmdiff_cache.store.convert import Selection, convert, plan_conversion
from mmdiff_cache.store.reader import Store
from mmdiff_cache.store.verify import verify
from tests.tiny_dinov3 import CHANNELS, LAYERS, save_tiny_dinov3

NAME = "tiny-dinov3"


@pytest.fixture(scope="module")
def stored(
    tiny_flux_folder: Path, tiny_dinov3_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Store:
    """Three scenes of 64 pixels: 8 x 8 tokens, 4 x 4 patches. Tests leave its data as it is."""
    config = ExtractConfig(
        backbone=str(tiny_flux_folder),
        store=str(tmp_path_factory.mktemp("stores") / "store"),
        splits=("val",),
        limit=3,
        resolution=64,
        batch_size=2,
        partition_size=2,
        layers=("double.1", "single.2"),
        timesteps=(0.5,),
        concepts={},
        discriminative=(str(tiny_dinov3_folder),),
    )
    return extract(config)


@pytest.fixture
def asked(stored: Store) -> ExtractConfig:
    """What the store was made with."""
    return ExtractConfig.from_json({**stored.manifest.config, "store": str(stored.path)})


@pytest.fixture
def both(asked: ExtractConfig, tmp_path: Path) -> ExtractConfig:
    """The same into a folder of the test's own."""
    return replace(asked, store=str(tmp_path / "store"))


def changed(folder: Path, target: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of the encoder, under the same name, whose patch embedding is another."""
    copy = Path(shutil.copytree(folder, target / folder.name))
    tensors = load_file(copy / "model.safetensors")
    name = "embeddings.patch_embeddings.bias"
    tensors[name] = change(tensors[name])
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_the_store_holds_what_the_encoder_gives(
    stored: Store, asked: ExtractConfig, tiny_dinov3_folder: Path
) -> None:
    """Through our reader, through plain zarr, and against the encoder on its own."""
    planned, reader = plan(asked), stored["val"]
    assert reader.discriminative[NAME].layers == LAYERS
    features = reader.discriminative_features(NAME, range(3))
    assert features.shape == (3, 2, 4, 4, CHANNELS)
    batch = [s for s in load_batch(planned, "val", [0, 1]) if isinstance(s, PreparedSample)]
    online = load_extractor(planned.config, planned.backbone)(batch).discriminative[NAME]
    assert online[:, 0].tobytes() == features[:2].tobytes()
    encoder = load_encoder(describe_encoder(str(tiny_dinov3_folder)))
    alone = encoder(torch.from_numpy(reader.images([0, 1])))
    np.testing.assert_array_equal(features[:2], clamp_to_float16(alone).numpy())
    array = zarr.open_array(stored.path / "val.zarr" / "discriminative" / NAME / "features", mode="r")
    np.testing.assert_array_equal(array[:, 0], features)
    assert f"discriminative {NAME}: blocks 1, 3 of 4 x 4 x {CHANNELS}" in str(stored)
    assert verify(stored.path).sound


def test_features_of_the_backbone_are_the_same_with_and_without(stored: Store, both: ExtractConfig) -> None:
    """And a store without cannot be gone on with as if it had them, while one with them serves both."""
    without = extract(replace(both, discriminative=()))
    assert stored.manifest.fingerprint == without.manifest.fingerprint
    one, other = (store["val"].hidden_states(range(3)) for store in (stored, without))
    assert one.tobytes() == other.tobytes()
    assert not without["val"].discriminative
    with pytest.raises(StoreError, match=f"contents discriminative.{NAME} is absent in the store, 1, 3 was"):
        extract(both)
    assert extract(replace(both, discriminative=(), store=str(stored.path)))["val"].discriminative


def test_a_mirrored_twin_is_encoded_mirrored_and_draws_share_their_features(both: ExtractConfig) -> None:
    store = extract(replace(both, limit=1, draws=2, flip=True, batch_size=1, partition_size=1))
    reader = store["val"]
    maps = [reader.discriminative_features(NAME, [0], variant) for variant in range(4)]
    flips = [variant.flipped for variant in reader.variants]
    assert flips == [False, False, True, True]
    np.testing.assert_array_equal(maps[0], maps[1])
    np.testing.assert_array_equal(maps[2], maps[3])
    encoder = load_encoder(describe_encoder(both.discriminative[0]))
    mirrored = encoder(torch.from_numpy(reader.images([0])[:, :, ::-1].copy()))
    np.testing.assert_array_equal(maps[2], clamp_to_float16(mirrored).numpy())
    assert not np.array_equal(maps[0], maps[2])


def test_the_plan_counts_its_bytes_and_files_and_shows_its_licence(
    stored: Store, asked: ExtractConfig
) -> None:
    planned, without = plan(asked), plan(replace(asked, discriminative=()))
    assert planned.raw_bytes - without.raw_bytes == 3 * 2 * 4 * 4 * CHANNELS * 2
    assert f"encoder    {NAME}: blocks 1, 3 of 4 x 4 x {CHANNELS} (see the model's own card)" in str(planned)
    files = sum(1 for file in stored.path.rglob("*.zarr/**/*") if file.is_file())
    assert files + len(list((stored.path / "partitions").iterdir())) == planned.files
    named = plan(replace(asked, discriminative=("dinov3-vitb16",), resolution=512))
    assert "dinov3-vitb16: blocks 2, 11 of 32 x 32 x 768 (DINOv3 License" in str(named)


def test_another_encoder_is_refused_by_field(
    asked: ExtractConfig, tiny_dinov3_folder: Path, tmp_path: Path
) -> None:
    other = changed(tiny_dinov3_folder, tmp_path, lambda bias: bias + 1)
    with pytest.raises(StoreError, match=f"contents discriminative.{NAME}.weights_sha256 is .* was asked"):
        extract(replace(asked, discriminative=(str(other),)))
    narrow = save_tiny_dinov3(tmp_path / "narrow" / NAME, hidden_size=16)
    with pytest.raises(StoreError, match=f"discriminative.{NAME}.channels is 24 in the store, 16 was asked"):
        extract(replace(asked, discriminative=(str(narrow),)))


def test_values_that_are_not_finite_fail_their_sample_by_name(
    both: ExtractConfig, tiny_dinov3_folder: Path, tmp_path: Path
) -> None:
    """Infinite ones too, which the clamp alone would hide."""
    broken = changed(tiny_dinov3_folder, tmp_path, lambda bias: bias + torch.inf)
    store = extract(replace(both, discriminative=(str(broken),)))
    assert store["val"].failed == dict.fromkeys(
        range(3), f"discriminative features of '{NAME}' are not finite"
    )
    assert not list((store.path / "val.zarr" / "discriminative" / NAME / "features").glob("c.*"))
    values = torch.tensor([1e6, -1e6, torch.inf, -torch.inf, torch.nan, 0.5])
    assert clamp_to_float16(values)[[0, 1, 5]].tolist() == [65504, -65504, 0.5]
    assert clamp_to_float16(values)[2:5].isnan().all()


def test_a_damaged_shard_is_found_and_extracted_again(stored: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(stored.path, tmp_path / "copy"))
    shard = copy / "val.zarr" / "discriminative" / NAME / "features" / "c.1.0.0.0.0.0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    assert verify(copy).partitions == {"val-000000"}
    assert verify(copy, limit=1).sound
    assert repair(copy).sound
    assert shard.read_bytes() == whole


def test_a_conversion_keeps_or_drops_it_and_can_be_repaired(stored: Store, tmp_path: Path) -> None:
    kept = convert(
        plan_conversion(stored.path, tmp_path / "kept", Selection(layers=["single.2"], codec="int8"))
    )
    features = stored["val"].discriminative_features(NAME, range(3))
    np.testing.assert_array_equal(kept["val"].discriminative_features(NAME, range(3)), features)
    dropped = convert(plan_conversion(stored.path, tmp_path / "dropped", Selection(discriminative=[])))
    assert not dropped["val"].discriminative
    assert kept.manifest.config["discriminative"] == stored.manifest.config["discriminative"]
    assert dropped.manifest.config["discriminative"] == []
    (tmp_path / "dropped" / "partitions" / "val-000001.json").unlink()
    assert repair(tmp_path / "dropped").sound
    with pytest.raises(ConfigError, match=f"encoder 'dino' is not stored; stored: {NAME}"):
        plan_conversion(stored.path, tmp_path / "x", Selection(discriminative=["dino"]))


def test_wrong_choices_are_refused_before_anything_is_begun(
    both: ExtractConfig, tiny_dinov3_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"multiple of 16, the patch of tiny-dinov3, got 40; .* 32 or 48"):
        plan(replace(both, resolution=40))
    twice = (str(tiny_dinov3_folder), str(tiny_dinov3_folder / ".." / tiny_dinov3_folder.name))
    with pytest.raises(ConfigError, match="names must be distinct"):
        plan(replace(both, discriminative=twice))
    with pytest.raises(BackboneError, match="the weights of dinov3-vitb16 are not on this machine"):
        extract(replace(both, discriminative=("dinov3-vitb16",)))
    assert not Path(str(both.store)).exists()
    assert run(["extract", "--discriminative", "dino", "--limit", "1", "--dry-run"]) == 2
    assert "'dino' is neither a discriminative encoder" in " ".join(capsys.readouterr().err.split())


def test_the_flag_takes_names_and_folders(
    tiny_dinov3_folder: Path, both: ExtractConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    names = f"dinov3-vitb16,{tiny_dinov3_folder}"
    arguments = ["extract", "--discriminative", names, "--limit", "1", "--dry-run"]
    assert run([*arguments, "--backbone", str(both.backbone), "--resolution", "64"]) == 0
    shown = capsys.readouterr().out
    assert "dinov3-vitb16: blocks 2, 11" in shown
    assert f"{NAME}: blocks 1, 3" in shown
