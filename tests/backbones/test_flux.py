"""The FLUX adapter gives what diffusers' pipeline gives, and refuses what would change features unseen."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from PIL import Image
from torch import Tensor

from mmdiff_cache.backbones.base import PromptEmbeddings
from mmdiff_cache.backbones.flux import FluxBackbone
from mmdiff_cache.backbones.info import TIMESTEPS
from mmdiff_cache.backbones.pipeline import PipelineBackbone
from mmdiff_cache.backbones.registry import describe, load_backbone
from mmdiff_cache.backbones.text import PROMPT_CACHE, SavedText
from mmdiff_cache.errors import BackboneError, ConfigError
from mmdiff_cache.extraction.concept_attention import reading
from mmdiff_cache.extraction.taps import capturing
from tests.tiny_flux import TEXT_LENGTH, WHOLE_WORDS, save_tiny_flux
from tests.tiny_sd3 import save_tiny_sd3

LATENT = (4, 8, 8)


@pytest.fixture(scope="module")
def pipeline(tiny_flux_folder: Path) -> FluxPipeline:
    return FluxPipeline.from_pretrained(tiny_flux_folder)


def pictures(count: int, side: int = 32) -> Tensor:
    return torch.randint(
        0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def noised(count: int) -> Tensor:
    return torch.randn(count, *LATENT, generator=torch.Generator().manual_seed(1))


def run(backbone: FluxBackbone, batch: int = 2, guidance: float | None = 3.5) -> Tensor:
    t = torch.linspace(0.1, 0.9, batch)
    return backbone.forward(noised(batch), t, backbone.encode_prompts(["near"] * batch), guidance)


@torch.no_grad()
def test_latents_are_those_of_the_pipelines_own_parts(
    tiny_backbone: FluxBackbone, pipeline: FluxPipeline
) -> None:
    images = pictures(3)
    pixels = pipeline.image_processor.preprocess([Image.fromarray(image.numpy()) for image in images])
    posterior = pipeline.vae.encode(pixels).latent_dist
    expected = (posterior.mode() - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    latent = tiny_backbone.encode_image(images)
    assert torch.equal(latent, expected)
    packed = pipeline._pack_latents(expected, 3, *LATENT)
    assert torch.equal(tiny_backbone.pack(latent).flatten(1, 2), packed)


def test_a_latent_does_not_depend_on_the_batch(tiny_backbone: FluxBackbone) -> None:
    images = pictures(5)
    together, alone = tiny_backbone.encode_image(images), tiny_backbone.encode_image(images[3:4])
    assert (together[3:4] - alone).norm() <= 1e-6 * alone.norm()


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_encodes_them(
    tiny_backbone: FluxBackbone, pipeline: FluxPipeline
) -> None:
    for prompt in ("", "a red ball near a box", "a very long prompt that does not fit at all"):
        encoded = tiny_backbone.encode_prompts([prompt])
        tokens, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=TEXT_LENGTH)
        assert torch.equal(encoded.tokens, tokens)
        assert torch.equal(encoded.pooled, pooled)


def test_a_prompts_embedding_does_not_depend_on_those_before_it(tiny_flux_folder: Path) -> None:
    """Resumed runs meet prompts in another order and with another cache; the bits must be the same."""
    prompts = ["a", "", "far", "a", ""]
    fresh = load_backbone(describe(str(tiny_flux_folder)))
    expected = [fresh.encode_prompts([prompt]) for prompt in prompts]
    used = load_backbone(describe(str(tiny_flux_folder)))
    for number in range(PROMPT_CACHE + 3):
        used.encode_prompts([f"a{number}"])
    got = used.encode_prompts(prompts)
    assert torch.equal(got.tokens, torch.cat([one.tokens for one in expected]))
    assert torch.equal(got.pooled, torch.cat([one.pooled for one in expected]))


@torch.no_grad()
def test_the_velocity_is_the_transformers_own(tiny_backbone: FluxBackbone, pipeline: FluxPipeline) -> None:
    latent, t = noised(3), torch.tensor([0.9, 0.5, 0.001])
    tokens, pooled, text_ids = pipeline.encode_prompt(["near", "far", ""], max_sequence_length=TEXT_LENGTH)
    ids = pipeline._prepare_latent_image_ids(3, 4, 4, torch.device("cpu"), torch.float32)
    expected = pipeline.transformer(
        hidden_states=pipeline._pack_latents(latent, 3, *LATENT),
        timestep=t,
        guidance=torch.full((3,), 2.0),
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=text_ids,
        img_ids=ids,
        return_dict=False,
    )[0]
    prompts = tiny_backbone.encode_prompts(["near", "far", ""])
    velocity = tiny_backbone.forward(latent, t, prompts, guidance=2.0)
    unpacked = pipeline._unpack_latents(expected, 32, 32, pipeline.vae_scale_factor)
    torch.testing.assert_close(velocity, unpacked, rtol=0, atol=1e-6)


def test_guidance_and_time_reach_the_model(tiny_backbone: FluxBackbone) -> None:
    prompts = tiny_backbone.encode_prompts(["near"])
    base = tiny_backbone.forward(noised(1), torch.tensor([0.5]), prompts, 3.5)
    assert not torch.equal(base, tiny_backbone.forward(noised(1), torch.tensor([0.5]), prompts, 1.0))
    assert not torch.equal(base, tiny_backbone.forward(noised(1), torch.tensor([0.6]), prompts, 3.5))
    with pytest.raises(ConfigError, match="takes a guidance scale"):
        tiny_backbone.forward(noised(1), torch.tensor([0.5]), prompts, None)


@pytest.mark.parametrize(
    ("layers", "kept"), [(["single.1", "double.0"], 2), (["double.1"], 0), (["single.3"], 4), ([], 0)]
)
def test_blocks_behind_the_deepest_layer_are_not_loaded(
    layers: Sequence[str], kept: int, tiny_flux_folder: Path
) -> None:
    backbone = load_backbone(describe(str(tiny_flux_folder)), layers=layers)
    assert [address for address in backbone.blocks if address.startswith("single.")] == [
        f"single.{index}" for index in range(kept)
    ]
    assert [address for address in backbone.blocks if address.startswith("double.")] == [
        "double.0",
        "double.1",
    ]


def test_every_block_has_its_address(tiny_backbone: FluxBackbone) -> None:
    assert tuple(tiny_backbone.blocks) == tiny_backbone.info.blocks
    for slot in tiny_backbone.blocks.values():
        assert slot.container[slot.index] is slot.block


def test_loading_is_silent_and_leaves_the_libraries_settings(
    tiny_flux_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    load_backbone(describe(str(tiny_flux_folder)), layers=["single.0"])
    assert capfd.readouterr() == ("", "")
    assert [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries] == before


def test_the_model_is_frozen(tiny_backbone: FluxBackbone) -> None:
    for slot in tiny_backbone.blocks.values():
        assert not slot.block.training
        assert not any(parameter.requires_grad for parameter in slot.block.parameters())
    assert not run(tiny_backbone).requires_grad


def test_identity_tells_weights_and_precision_apart(tiny_flux_folder: Path, tmp_path: Path) -> None:
    whole = load_backbone(describe(str(tiny_flux_folder))).identity()
    assert whole["dtype"] == "float32"
    assert whole == load_backbone(describe(str(tiny_flux_folder)), layers=["single.0"]).identity()
    assert whole == load_backbone(describe(str(shutil.copytree(tiny_flux_folder, tmp_path / "a")))).identity()
    assert whole != load_backbone(describe(str(tiny_flux_folder)), dtype="bfloat16").identity()
    other = save_tiny_flux(tmp_path / "b", seed=1)
    assert whole["weights_sha256"] != load_backbone(describe(str(other))).identity()["weights_sha256"]


def test_in_bfloat16_only_the_vae_stays_in_float32(
    tiny_flux_folder: Path, tiny_backbone: FluxBackbone
) -> None:
    backbone = load_backbone(describe(str(tiny_flux_folder)), dtype="bfloat16")
    assert torch.equal(backbone.encode_image(pictures(2)), tiny_backbone.encode_image(pictures(2)))
    assert backbone.encode_prompts([""]).tokens.dtype == torch.bfloat16
    assert isinstance(backbone, FluxBackbone)
    velocity = run(backbone)
    assert velocity.dtype == torch.bfloat16
    torch.testing.assert_close(velocity.float(), run(tiny_backbone), rtol=0.1, atol=0.05)


def test_the_papers_times_are_exact_in_bfloat16(tiny_flux_folder: Path, tmp_path: Path) -> None:
    """The model's time is rounded to the model's dtype; these four survive it, for the concepts as well."""
    for folder in (tiny_flux_folder, save_tiny_sd3(tmp_path / "tiny-sd3")):
        backbone = load_backbone(describe(str(folder)), dtype="bfloat16")
        assert isinstance(backbone, PipelineBackbone)
        seen: list[list[float]] = []
        backbone._transformer.time_text_embed.register_forward_pre_hook(
            lambda _m, inputs, seen=seen: seen.append(inputs[0].to(torch.bfloat16).tolist())
        )
        t = torch.tensor(TIMESTEPS)
        backbone.concept_modulation(t, backbone.info.guidance)
        latent = torch.zeros(4, *backbone.info.latent_shape(32))
        backbone.forward(latent, t, backbone.encode_prompts([""] * 4), backbone.info.guidance)
        assert seen == [[780, 520, 260, 1]] * 2


def test_accelerations_that_change_what_a_tap_sees_are_refused(tiny_flux_folder: Path) -> None:
    backbone = load_backbone(describe(str(tiny_flux_folder)))
    assert isinstance(backbone, FluxBackbone)
    expected = run(backbone)
    backbone._transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(BackboneError, match="step cache"):
        run(backbone)
    backbone._transformer.disable_cache()
    backbone._transformer.fuse_qkv_projections()
    with pytest.raises(BackboneError, match="fused"):
        run(backbone)
    backbone._transformer.unfuse_qkv_projections()
    backbone._transformer._parallel_config = object()
    with pytest.raises(BackboneError, match="sharded"):
        run(backbone)
    backbone._transformer._parallel_config = None
    assert torch.equal(run(backbone), expected)


@torch.no_grad()
def test_a_concept_is_the_mean_of_its_own_pieces(tiny_backbone: FluxBackbone, pipeline: FluxPipeline) -> None:
    words = (*WHOLE_WORDS, "sky", "near far")
    embedded = tiny_backbone.embed_concepts(words)
    for word, got in zip(words, embedded, strict=True):
        tokens = pipeline.encode_prompt(word, max_sequence_length=TEXT_LENGTH)[0][0]
        pieces = pipeline.tokenizer_2.convert_ids_to_tokens(pipeline.tokenizer_2(word).input_ids)[:-1]
        assert len(pieces) == {"sky": 4, "near far": 2}.get(word, 1)
        expected = pipeline.transformer.context_embedder(tokens[: len(pieces)].mean(dim=0))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_a_concept_that_the_text_length_cuts_is_refused(tiny_flux_folder: Path) -> None:
    """Its mean would be over some of its pieces and the end marker: 'sky' has four."""
    short = load_backbone(describe(str(tiny_flux_folder)), text_length=4)
    with pytest.raises(ConfigError, match="'sky' has 4 tokens, so text_length must be at least 5, got 4"):
        short.embed_concepts(["near", "sky"])
    load_backbone(describe(str(tiny_flux_folder)), text_length=5).embed_concepts(["near", "sky"])


def test_a_concept_without_tokens_is_refused(tiny_backbone: FluxBackbone) -> None:
    with pytest.raises(ConfigError, match="has no token"):
        tiny_backbone.embed_concepts(["object", ""])


@torch.no_grad()
def test_concepts_are_conditioned_on_time_and_guidance_but_no_prompt(
    tiny_backbone: FluxBackbone, pipeline: FluxPipeline
) -> None:
    t = torch.tensor([0.78, 0.001])
    got = tiny_backbone.concept_modulation(t, 3.5)
    expected = pipeline.transformer.time_text_embed(t * 1000, torch.full((2,), 3500.0), torch.zeros(2, 32))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(device: str, tiny_flux_folder: Path) -> None:
    with pytest.raises(ConfigError, match="device"):
        load_backbone(describe(str(tiny_flux_folder)), device=device)


def test_flux_dev_at_full_size_runs_through_the_same_code(tiny_flux_folder: Path) -> None:
    """All 57 blocks of FLUX.1-dev's real shape, on the meta device: shapes are computed, numbers are not."""
    info = describe("flux-dev")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    pipeline = FluxPipeline.from_pretrained(tiny_flux_folder, transformer=transformer)
    backbone = FluxBackbone(
        info, pipeline, folder=tiny_flux_folder, text=SavedText(tiny_flux_folder, device=torch.device("meta"))
    )
    assert tuple(backbone.blocks) == info.blocks
    channels, height, width = info.latent_shape(info.resolution)
    t = torch.empty(2, device="meta")
    prompts = PromptEmbeddings(
        tokens=torch.empty(2, info.text_length, 4096, device="meta", dtype=torch.bfloat16),
        pooled=torch.empty(2, 768, device="meta", dtype=torch.bfloat16),
    )
    words = torch.empty(4, info.channels, device="meta", dtype=torch.bfloat16)
    modulation = backbone.concept_modulation(t, info.guidance)
    with (
        reading(backbone.blocks, {"words": words}, modulation) as streams,
        capturing(backbone.blocks, info.layers, text_tokens=info.text_length, image_tokens=1024) as seen,
    ):
        noised = torch.empty(2, channels, height, width, device="meta")
        velocity = backbone.forward(noised, t, prompts, info.guidance)
    assert velocity.shape == (2, 16, 64, 64)
    assert {address: tuple(tensor.shape) for address, tensor in seen.items()} == dict.fromkeys(
        info.layers, (2, 1024, 3072)
    )
    assert list(streams["words"].scores) == list(info.double_blocks)
    assert {tuple(scores.shape) for scores in streams["words"].scores.values()} == {(2, 4, 1024)}
