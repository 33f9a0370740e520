"""The SD3 adapter gives what diffusers' pipeline gives; its concepts follow the paper's equations."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from mmdiff_cache.backbones.base import PromptEmbeddings
from mmdiff_cache.backbones.registry import describe, load_backbone
from mmdiff_cache.backbones.sd3 import SD3Backbone
from mmdiff_cache.backbones.text import SavedText
from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.errors import BackboneError
from mmdiff_cache.extraction.concept_attention import reading
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.extraction.taps import capturing
from mmdiff_cache.store.verify import verify
from tests.tiny_sd3 import CLIP_LENGTH, T5_LENGTH, save_tiny_sd3

LATENT = (4, 8, 8)
TEXT = CLIP_LENGTH + T5_LENGTH
T = torch.tensor([0.78, 0.001])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sd3(tmp_path_factory.mktemp("sd3") / "tiny-sd3")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> SD3Backbone:
    """Weights large enough that every term of the equations matters."""
    loaded = load_backbone(describe(str(folder)), device="cpu")
    assert isinstance(loaded, SD3Backbone)
    return loaded


def noised(count: int = 2) -> Tensor:
    return torch.randn(count, *LATENT, generator=torch.Generator().manual_seed(1))


def test_the_folder_tells_its_shape(folder: Path) -> None:
    info = describe(str(folder))
    assert info.architecture.pipeline == "StableDiffusion3Pipeline"
    assert info.blocks == ("double.0", "double.1", "double.2", "double.3")
    assert info.layers == ("double.0", "double.1", "double.2", "double.3")
    assert (info.text_length, info.architecture.clip_tokens, info.guidance) == (T5_LENGTH, CLIP_LENGTH, None)
    assert info.latent_shape(32) == LATENT


@torch.no_grad()
def test_prompts_and_velocity_are_the_pipelines_own(
    backbone: SD3Backbone, pipeline: StableDiffusion3Pipeline
) -> None:
    words = ["near a ball", ""]
    tokens, _, pooled, _ = pipeline.encode_prompt(
        words, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
    )
    prompts = backbone.encode_prompts(words)
    assert prompts.tokens.shape == (2, TEXT, 32)
    torch.testing.assert_close(prompts.tokens, tokens, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prompts.pooled, pooled, rtol=1e-5, atol=1e-6)
    expected = pipeline.transformer(
        hidden_states=noised(),
        timestep=T * 1000,
        encoder_hidden_states=prompts.tokens,
        pooled_projections=prompts.pooled,
        return_dict=False,
    )[0]
    assert torch.equal(backbone.forward(noised(), T, prompts, None), expected)


@torch.no_grad()
def test_taps_give_what_the_blocks_put_out(backbone: SD3Backbone, pipeline: StableDiffusion3Pipeline) -> None:
    """The last block has no text output; image tokens are row by row."""
    prompts = backbone.encode_prompts(["near", ""])
    kept: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _i, output: kept.append(output[1].clone()))
        for block in pipeline.transformer.transformer_blocks
    ]
    pipeline.transformer(
        hidden_states=noised(),
        timestep=T * 1000,
        encoder_hidden_states=prompts.tokens,
        pooled_projections=prompts.pooled,
    )
    for handle in handles:
        handle.remove()
    with capturing(backbone.blocks, backbone.blocks, text_tokens=TEXT, image_tokens=16) as seen:
        backbone.forward(noised(), T, prompts, None)
    for number, expected in enumerate(kept):
        assert torch.equal(seen[f"double.{number}"], expected)


def test_accelerations_are_refused(folder: Path) -> None:
    backbone = load_backbone(describe(str(folder)))
    assert isinstance(backbone, SD3Backbone)
    backbone._transformer.fuse_qkv_projections()
    with pytest.raises(BackboneError, match="fused"):
        backbone.forward(noised(), T, backbone.encode_prompts(["", ""]), None)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()


def rms_norm(layer: nn.Module, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight


def condition_of(norm: nn.Module, condition: Tensor, parts: int) -> tuple[Tensor, ...]:
    return linear(norm.linear, torch.nn.functional.silu(condition)).chunk(parts)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (queries @ keys.T / keys.shape[-1] ** 0.5).softmax(-1) @ values


def slow_step(
    block: nn.Module, concepts: Tensor, condition: Tensor, image: Tensor, text: Tensor, temb: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One sample, one block, head by head: o_x, o_c (Paper: Eq. 3), and the updated concepts."""
    attn, size = block.attn, 16
    shift, scale, *_ = condition_of(block.norm1, temb, 9 if block.use_dual_attention else 6)
    image = layer_norm(image) * (1 + scale) + shift
    rest: list[Tensor] = []
    if block.context_pre_only:  # this norm has the scale first
        scale_t, shift_t = condition_of(block.norm1_context, temb, 2)
        scale_c, shift_c = condition_of(block.norm1_context, condition, 2)
    else:
        shift_t, scale_t, *_ = condition_of(block.norm1_context, temb, 6)
        shift_c, scale_c, *rest = condition_of(block.norm1_context, condition, 6)
    text = layer_norm(text) * (1 + scale_t) + shift_t
    normed = layer_norm(concepts) * (1 + scale_c) + shift_c
    heads_x, heads_c = [], []
    for head in range(2):
        part = slice(head * size, (head + 1) * size)
        q_x = rms_norm(attn.norm_q, linear(attn.to_q, image)[:, part])
        k_x = rms_norm(attn.norm_k, linear(attn.to_k, image)[:, part])
        v_x = linear(attn.to_v, image)[:, part]
        k_t = rms_norm(attn.norm_added_k, linear(attn.add_k_proj, text)[:, part])
        v_t = linear(attn.add_v_proj, text)[:, part]
        q_c = rms_norm(attn.norm_added_q, linear(attn.add_q_proj, normed)[:, part])
        k_c = rms_norm(attn.norm_added_k, linear(attn.add_k_proj, normed)[:, part])
        v_c = linear(attn.add_v_proj, normed)[:, part]
        heads_x.append(attend(q_x, torch.cat((k_t, k_x)), torch.cat((v_t, v_x))))
        heads_c.append(attend(q_c, torch.cat((k_c, k_x)), torch.cat((v_c, v_x))))
    o_x, o_c = torch.cat(heads_x, dim=-1), torch.cat(heads_c, dim=-1)
    if block.context_pre_only:
        return o_x, o_c, concepts
    gate, shift, scale, mlp_gate = rest
    concepts = concepts + gate * linear(attn.to_add_out, o_c)
    hidden = torch.nn.functional.gelu(
        linear(block.ff_context.net[0].proj, layer_norm(concepts) * (1 + scale) + shift), approximate="tanh"
    )
    return o_x, o_c, concepts + mlp_gate * linear(block.ff_context.net[2], hidden)


@torch.no_grad()
def test_concepts_follow_the_equations_and_the_image_never_knows(folder: Path) -> None:
    """Against a second implementation that knows neither ours nor diffusers' modules, only their weights."""
    backbone = load_backbone(describe(str(folder)))
    assert isinstance(backbone, SD3Backbone)
    blocks, generator = backbone._transformer.transformer_blocks, torch.Generator().manual_seed(0)
    for parameter in blocks.parameters():
        parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape, generator=generator))
    prompts = backbone.encode_prompts(["near", ""])
    embedded, condition = backbone.embed_concepts(("object", "sky")), backbone.concept_modulation(T, None)
    recorded: list[dict[str, Tensor]] = []
    handles = [
        block.register_forward_pre_hook(lambda _m, _a, inputs: recorded.append(inputs), with_kwargs=True)
        for block in blocks
    ]
    plain = backbone.forward(noised(), T, prompts, None)
    for handle in handles:
        handle.remove()
    with reading(backbone.blocks, {"words": embedded}, condition) as streams:
        assert torch.equal(backbone.forward(noised(), T, prompts, None), plain)
    scores = streams["words"].scores
    assert list(scores) == ["double.0", "double.1", "double.2", "double.3"]
    for sample in range(2):
        concepts = embedded
        for number, (block, inputs) in enumerate(zip(blocks, recorded, strict=True)):
            image, text = inputs["hidden_states"][sample], inputs["encoder_hidden_states"][sample]
            o_x, o_c, concepts = slow_step(
                block, concepts, condition[sample], image, text, inputs["temb"][sample]
            )
            torch.testing.assert_close(scores[f"double.{number}"][sample], o_c @ o_x.T, rtol=1e-4, atol=1e-5)
    assert scores["double.3"].std() > 1e-3


@torch.no_grad()
def test_a_concept_is_the_mean_of_its_own_pieces(
    backbone: SD3Backbone, pipeline: StableDiffusion3Pipeline
) -> None:
    for word, pieces in (("near", 1), ("sky", 4)):
        t5 = pipeline._get_t5_prompt_embeds(word, max_sequence_length=T5_LENGTH)[0, :pieces]
        expected = pipeline.transformer.context_embedder(t5.mean(dim=0))
        torch.testing.assert_close(backbone.embed_concepts((word,))[0], expected, rtol=1e-5, atol=1e-6)


def test_stage_one_runs_on_it_to_the_end(folder: Path, tmp_path: Path) -> None:
    config = ExtractConfig(
        backbone=str(folder),
        store=str(tmp_path / "s"),
        splits=("val",),
        limit=3,
        resolution=32,
        batch_size=2,
        partition_size=2,
        concepts={"two": ("near", "far")},
    )
    store = extract(config)
    reader = store["val"]
    assert reader.layers == ("double.0", "double.1", "double.2", "double.3")
    assert reader.hidden_states([0, 1, 2]).shape == (3, 4, 4, 4, 4, 32)
    assert np.isfinite(reader.concept_scores("two", [2])).all()
    assert store.manifest.identity["pipeline"] == "StableDiffusion3Pipeline"
    assert verify(store.path).sound


@pytest.mark.parametrize(("name", "blocks", "dual"), [("sd35-large", 38, 0), ("sd35-medium", 24, 13)])
def test_sd35_at_full_size_runs_through_the_same_code(
    name: str, blocks: int, dual: int, pipeline: StableDiffusion3Pipeline, folder: Path
) -> None:
    """All blocks of the real shape, on the meta device: shapes are computed, numbers are not."""
    info = describe(name)
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            num_layers=blocks,
            num_attention_heads=blocks,
            attention_head_dim=64,
            caption_projection_dim=64 * blocks,
            qk_norm="rms_norm",
            dual_attention_layers=tuple(range(dual)),
            pos_embed_max_size=192,
        ).to(torch.bfloat16)
    whole = StableDiffusion3Pipeline.from_pretrained(folder, transformer=transformer)
    backbone = SD3Backbone(info, whole, folder=folder, text=SavedText(folder, device=torch.device("meta")))
    assert tuple(backbone.blocks) == info.blocks
    text = info.architecture.clip_tokens + info.text_length
    prompts = PromptEmbeddings(
        tokens=torch.empty(2, text, 4096, device="meta", dtype=torch.bfloat16),
        pooled=torch.empty(2, 2048, device="meta", dtype=torch.bfloat16),
    )
    words = torch.empty(4, info.channels, device="meta", dtype=torch.bfloat16)
    t = torch.empty(2, device="meta")
    with (
        reading(backbone.blocks, {"words": words}, backbone.concept_modulation(t, None)) as streams,
        capturing(backbone.blocks, info.layers, text_tokens=text, image_tokens=1024) as seen,
    ):
        velocity = backbone.forward(torch.empty(2, 16, 64, 64, device="meta"), t, prompts, None)
    assert velocity.shape == (2, 16, 64, 64)
    assert {tuple(tensor.shape) for tensor in seen.values()} == {(2, 1024, info.channels)}
    assert list(streams["words"].scores) == list(info.double_blocks)
