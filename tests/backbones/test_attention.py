"""A backend by name is used where it works, refused in one line where not, and nobody else notices."""

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from mmdiff_cache.backbones.base import Backbone
from mmdiff_cache.backbones.flux import FluxBackbone
from mmdiff_cache.backbones.registry import describe, load_backbone
from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.errors import BackboneError, ConfigError
from mmdiff_cache.extraction.plan import resolve
from tests.tiny_sd3 import save_tiny_sd3


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sd3(tmp_path_factory.mktemp("backbones") / "tiny-sd3")


def run(backbone: Backbone) -> Tensor:
    noised = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guidance = backbone.info.guidance
    return backbone.forward(noised, torch.tensor([0.5, 0.1]), backbone.encode_prompts(["", "near"]), guidance)


def load(folder: Path) -> Backbone:
    return load_backbone(describe(str(folder)))


@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_a_backend_that_works_is_used_and_agrees(
    name: str, tiny_flux_folder: Path, tiny_backbone: FluxBackbone
) -> None:
    backbone = load(tiny_flux_folder)
    backbone.use_attention(name)
    blocks = [slot.block for slot in backbone.blocks.values()]
    assert {block.attn.processor._attention_backend.value for block in blocks} == {name}  # type: ignore[union-attr]
    torch.testing.assert_close(run(backbone), run(tiny_backbone), rtol=1e-5, atol=1e-6)


def test_a_backend_that_fails_in_the_forward_only_is_refused_with_those_that_work(
    tiny_flux_folder: Path, tiny_backbone: FluxBackbone
) -> None:
    """cuDNN's passes every check of diffusers, here as well; so does an xformers built for another torch."""
    backbone = load(tiny_flux_folder)
    with pytest.raises(
        BackboneError, match=r"'_native_cudnn' does not work .* on cpu .*do: .*native"
    ) as error:
        backbone.use_attention("_native_cudnn")
    assert "\n" not in str(error.value)
    assert torch.equal(run(backbone), run(tiny_backbone))


def test_the_choice_of_one_model_is_not_that_of_another(tiny_flux_folder: Path) -> None:
    """Diffusers sets the whole process's backend with a model's, and its reset does not put it back."""

    def active() -> str:
        seen: list[str] = []
        query = torch.zeros(1, 4, 2, 16)
        with torch.profiler.profile() as profile:
            dispatch_attention_fn(query, query, query)
        seen += sorted({event.key for event in profile.key_averages() if "attention" in event.key})
        return " ".join(seen)

    before = active()
    load(tiny_flux_folder).use_attention("_native_math")
    assert active() == before
    with pytest.raises(BackboneError):
        load(tiny_flux_folder).use_attention("_native_cudnn")
    assert active() == before


def test_an_unknown_name_is_refused_with_the_known_ones(tiny_flux_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"attention must be one of .*xformers.*, got 'quick'"):
        load(tiny_flux_folder).use_attention("quick")


def test_sd3_takes_no_part_in_the_dispatch_and_says_so_before_anything_is_loaded(sd3_folder: Path) -> None:
    backbone = load(sd3_folder)
    plain = run(backbone)
    backbone.use_attention("native")
    assert torch.equal(run(backbone), plain)
    for refused in ("flash", "_native_math"):
        with pytest.raises(ConfigError, match=f"by native or xformers only, got '{refused}'"):
            resolve(ExtractConfig(backbone=str(sd3_folder), resolution=64, attention=refused))
    with pytest.raises(BackboneError, match=r"'xformers' does not work .* these do: native$"):
        backbone.use_attention("xformers")
    assert torch.equal(run(backbone), plain)


def test_the_environments_backend_is_the_default_where_it_counts(
    monkeypatch: pytest.MonkeyPatch, tiny_flux_folder: Path, sd3_folder: Path
) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "_native_math")
    assert resolve(ExtractConfig(backbone=str(tiny_flux_folder), resolution=64)).attention == "_native_math"
    assert resolve(ExtractConfig(backbone=str(sd3_folder), resolution=64)).attention == "native"
