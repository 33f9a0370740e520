"""Averaged cross-attention against the attention weights themselves, formed the slow way."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from torch import Tensor

from mmdiff_cache.backbones.base import Backbone
from mmdiff_cache.backbones.registry import describe, load_backbone
from mmdiff_cache.config import ExtractConfig, NoiseConfig
from mmdiff_cache.errors import BackboneError, ConfigError, StoreError
from mmdiff_cache.extraction.cross_attention import reading
from mmdiff_cache.extraction.extractor import Extractor
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.extraction.taps import capturing
from mmdiff_cache.store.convert import Selection, convert, plan_conversion
from mmdiff_cache.store.verify import verify
from tests.tiny_flux import save_tiny_flux
from tests.tiny_sd3 import save_tiny_sd3

T = torch.tensor([0.78, 0.001])
IMAGE_TOKENS = 16


@pytest.fixture(scope="module", params=["flux", "sd3"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("deep") / request.param
    save = save_tiny_flux if request.param == "flux" else save_tiny_sd3
    loaded = load_backbone(describe(str(save(folder, seed=3))))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # weights large enough that attention is far from even
        for slot in loaded.blocks.values():
            for parameter in slot.block.parameters():
                parameter.copy_(parameter + 0.2 * torch.randn(parameter.shape, generator=generator))
    return loaded


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of every attention that the model computes over text and image together."""
    calls: list[tuple[Tensor, Tensor]] = []
    real = F.scaled_dot_product_attention

    def recorded(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.shape[2] == key.shape[2] > IMAGE_TOKENS:
            calls.append((query, key))
        return real(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    return calls


def run(backbone: Backbone, *, read: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], int]:
    channels = backbone.info.architecture.latent_channels
    noised = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = backbone.encode_prompts(["near", ""])
    text = prompts.tokens.shape[1]
    with capturing(backbone.blocks, backbone.blocks, text_tokens=text, image_tokens=IMAGE_TOKENS) as seen:
        if not read:
            return backbone.forward(noised, T, prompts, backbone.info.guidance), seen, {}, text
        with reading(backbone.blocks) as maps:
            return backbone.forward(noised, T, prompts, backbone.info.guidance), seen, maps, text


def test_a_map_is_the_mean_weight_of_the_text_tokens(
    backbone: Backbone, attended: list[tuple[Tensor, Tensor]]
) -> None:
    _, _, maps, text = run(backbone, read=True)
    assert list(maps) == list(backbone.info.double_blocks)
    image_first = backbone.info.architecture.pipeline != "FluxPipeline"
    for (query, key), (address, found) in zip(attended, maps.items(), strict=False):
        weights = (query.double() @ key.double().mT * query.shape[-1] ** -0.5).softmax(dim=-1)
        on_text = weights[:, :, :IMAGE_TOKENS, IMAGE_TOKENS:] if image_first else weights[:, :, text:, :text]
        expected = on_text.mean(dim=(1, 3))
        assert found.shape == (2, IMAGE_TOKENS)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8, msg=address)
        assert expected.std() > 0.01 * expected.mean(), "a map that is not flat"


def test_the_model_never_knows_of_it(backbone: Backbone) -> None:
    plain, blocks, _, _ = run(backbone, read=False)
    watched, same_blocks, _, _ = run(backbone, read=True)
    assert torch.equal(plain, watched)
    assert all(torch.equal(blocks[address], same_blocks[address]) for address in blocks)
    again, _, _, _ = run(backbone, read=False)
    assert torch.equal(plain, again)


def test_concepts_that_are_read_beside_it_change_nothing(backbone: Backbone) -> None:
    """They go through the same key projections as the prompt, whose keys it has to see."""
    noised = torch.randn(
        2, backbone.info.architecture.latent_channels, 8, 8, generator=torch.Generator().manual_seed(1)
    )
    prompts = backbone.encode_prompts(["near", ""])
    seen = {
        words: Extractor(
            backbone,
            layers=["double.1"],
            timesteps=T.tolist(),
            vocabularies={"words": ("near", "far", "sky")} if words else {},
            noise=NoiseConfig(),
            guidance=backbone.info.guidance,
            cross_attention=True,
        ).observe(noised, T, prompts)
        for words in (False, True)
    }
    alone, beside = seen[False].cross_attention, seen[True].cross_attention
    assert alone is not None
    assert beside is not None
    assert torch.equal(alone, beside)
    assert list(seen[True].concept_scores) == ["words"]


def test_a_block_that_was_compiled_is_refused(tiny_flux_folder: Path) -> None:
    """Its graph may be older than the hooks, which would then never be called."""
    compiled = load_backbone(describe(str(tiny_flux_folder)))
    compiled.blocks["double.1"].block.compile(backend="eager")
    with pytest.raises(BackboneError, match="cross-attention need uncompiled double blocks"):
        run(compiled, read=True)


def test_a_store_keeps_it_beside_the_rest(tiny_flux_folder: Path, tmp_path: Path) -> None:
    """Written, read by plain zarr, verified, converted; asked of a store without it, refused by name."""
    config = ExtractConfig(
        splits=("val",),
        limit=3,
        resolution=32,
        batch_size=2,
        partition_size=2,
        backbone=str(tiny_flux_folder),
        store=str(tmp_path / "store"),
        cross_attention=True,
        flip=True,
    )
    store = extract(config)
    reader = store["val"]
    maps = reader.cross_attention([0, 2], timesteps=[0.26], variant=1)
    plain = zarr.open_group(store.path / "val.zarr", mode="r")["cross_attention/maps"]
    assert plain.metadata.dimension_names == (
        "sample", "variant", "timestep", "block", "height", "width",
    )  # fmt: skip
    np.testing.assert_array_equal(maps[:, 0], np.asarray(plain[:])[[0, 2], 1, reader.timestep_index(0.26)])
    assert verify(store.path).sound
    smaller = convert(
        plan_conversion(store.path, tmp_path / "small", Selection(timesteps=(0.26,), variants=[1]))
    )
    np.testing.assert_array_equal(smaller["val"].cross_attention([0, 2]), maps)
    bare = extract(replace(config, store=str(tmp_path / "bare"), cross_attention=False))
    with pytest.raises(ConfigError, match="extract with --cross-attention"):
        bare["val"].cross_attention([0])
    with pytest.raises(StoreError, match="cross_attention"):
        extract(replace(config, store=str(bare.path)))
