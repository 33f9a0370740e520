"""What can be known of a backbone from its configuration alone."""

import inspect
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st

from mmdiff_cache.backbones.info import (
    PAPER_SINGLE_BLOCKS,
    PAPER_SINGLE_LAYERS,
    Architecture,
    default_concept_blocks,
    default_layers,
    default_width,
    same_depth,
)
from mmdiff_cache.backbones.registry import BACKBONES, describe, load_backbone
from mmdiff_cache.errors import BackboneError, ConfigError
from tests.tiny_flux import TEXT_LENGTH


def test_flux_dev_has_the_papers_choices() -> None:
    info = describe("flux-dev")
    assert info.layers == ("single.4", "single.15", "single.26", "single.37")
    assert info.timesteps == (0.78, 0.52, 0.26, 0.001)
    assert info.concept_blocks == ("double.15", "double.16", "double.17", "double.18")
    assert info.token_grid(info.resolution) == (32, 32)
    assert info.latent_shape(512) == (16, 64, 64)
    assert (info.channels, info.packed_channels, info.aggregator_width) == (3072, 64, 768)
    assert (info.guidance, info.text_length, info.dtype) == (3.5, 512, "bfloat16")
    assert len(info.blocks) == 19 + 38


def test_the_recorded_shape_of_flux_dev_is_that_of_its_class() -> None:
    """The class's defaults are FLUX.1-dev's, and `describe` knows them before a file of it is here."""
    architecture = describe("flux-dev").architecture
    signature = inspect.signature(FluxTransformer2DModel.__init__).parameters
    default = {name: parameter.default for name, parameter in signature.items()}
    assert architecture.double_blocks == default["num_layers"]
    assert architecture.single_blocks == default["num_single_layers"]
    assert architecture.channels == default["num_attention_heads"] * default["attention_head_dim"]
    assert architecture.latent_channels * 4 == default["in_channels"]


def test_the_rules_for_any_folder_give_the_named_backbones_their_defaults() -> None:
    flux = describe("flux-dev").architecture
    assert default_layers(flux) == BACKBONES["flux-dev"].layers
    assert default_width(flux.channels) == BACKBONES["flux-dev"].aggregator_width
    scenes = Architecture(
        pipeline="FluxPipeline",
        double_blocks=4,
        single_blocks=12,
        channels=128,
        latent_channels=4,
        vae_factor=4,
        guidance_embeds=True,
        text_channels=96,
        pooled_channels=96,
    )
    assert default_layers(scenes) == BACKBONES["flux-scenes"].layers
    assert default_concept_blocks(scenes) == ("double.2", "double.3")
    assert default_width(scenes.channels) == BACKBONES["flux-scenes"].aggregator_width


@given(st.integers(1, 200))
def test_layers_at_the_same_depth_reach_the_last_block_and_keep_their_order(count: int) -> None:
    chosen = same_depth(PAPER_SINGLE_LAYERS, PAPER_SINGLE_BLOCKS, count)
    assert chosen[-1] == count - 1
    assert list(chosen) == sorted(set(chosen))
    if count >= PAPER_SINGLE_BLOCKS:
        assert len(chosen) == len(PAPER_SINGLE_LAYERS)


@given(st.integers(2, 512))
def test_the_aggregator_is_narrower_than_the_backbone_and_splits_into_eight_heads(heads: int) -> None:
    width = default_width(heads * 8)
    assert width % 8 == 0
    assert 0 < width < heads * 8


def test_a_folder_is_described_from_its_configuration(tiny_flux_folder: Path) -> None:
    info = describe(str(tiny_flux_folder))
    assert info.name == tiny_flux_folder.name
    assert Path(info.source) == tiny_flux_folder
    assert info.blocks == ("double.0", "double.1", "single.0", "single.1", "single.2", "single.3")
    assert (info.channels, info.packed_channels, info.guidance) == (32, 16, 3.5)
    assert (info.resolution, info.token_grid(32), info.latent_shape(32)) == (32, (4, 4), (4, 8, 8))
    assert (info.text_length, info.dtype) == (TEXT_LENGTH, "float32")
    assert info.concept_blocks == ("double.1",)
    assert pickle.loads(pickle.dumps(info)) == info


def test_an_unknown_layer_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        describe("flux-dev").check_layers(["single.4", "single.41"])
    assert str(caught.value) == (
        "layer single.41 is not a block of flux-dev (double.0..double.18, single.0..single.37)"
    )


@pytest.mark.parametrize("layer", ["single.4", "single.-1", "single.00", "double.2", "4", "", "triple.0"])
def test_only_exact_addresses_are_layers(layer: str, tiny_flux_folder: Path) -> None:
    with pytest.raises(ConfigError, match="is not a block of"):
        load_backbone(describe(str(tiny_flux_folder)), layers=[layer])


@pytest.mark.parametrize("resolution", [0, -8, 4, 31, 33])
def test_a_resolution_must_fill_its_tokens(resolution: int, tiny_flux_folder: Path) -> None:
    with pytest.raises(ConfigError, match="must be a multiple of 8"):
        describe(str(tiny_flux_folder)).token_grid(resolution)


def test_what_is_neither_a_name_nor_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a backbone \(flux-scenes, flux-dev, .*\) nor a folder"):
        describe(str(tmp_path / "nothing"))


def test_folders_of_another_format_are_refused(tmp_path: Path, tiny_flux_folder: Path) -> None:
    with pytest.raises(BackboneError, match=r"has no model_index\.json"):
        describe(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(
        BackboneError, match="holds a WanPipeline; backbones are folders of FluxPipeline or Stable"
    ):
        describe(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(BackboneError, match="that names a pipeline"):
        describe(str(tmp_path))
    fill = shutil.copytree(tiny_flux_folder, tmp_path / "fill")
    config = json.loads((fill / "transformer" / "config.json").read_text())
    (fill / "transformer" / "config.json").write_text(json.dumps(config | {"in_channels": 96}))
    with pytest.raises(BackboneError, match="takes 96 channels a token"):
        describe(str(fill))


def test_describing_imports_no_torch(tiny_flux_folder: Path) -> None:
    code = (
        "import sys; from mmdiff_cache.backbones.registry import describe; "
        f"describe('flux-dev'); describe({str(tiny_flux_folder)!r}); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
