"""The concept stream does what the paper's equations say, and the image never knows of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmdiff_cache.backbones.flux import FluxBackbone
from mmdiff_cache.backbones.registry import describe, load_backbone
from mmdiff_cache.errors import BackboneError
from mmdiff_cache.extraction.concept_attention import ConceptStream, concept_maps, reading
from mmdiff_cache.extraction.taps import capturing
from tests.tiny_flux import TEXT_LENGTH, save_tiny_flux

WORDS = ("object", "sky", "background")
T = torch.tensor([0.78, 0.001])


@pytest.fixture(scope="module", autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> FluxBackbone:
    """Three double blocks and weights large enough that every term of the equations matters."""
    folder = save_tiny_flux(
        tmp_path_factory.mktemp("deep") / "flux", seed=3, double_blocks=3, single_blocks=1
    )
    backbone = load_backbone(describe(str(folder)))
    assert isinstance(backbone, FluxBackbone)
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone._transformer.transformer_blocks.parameters():
        parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape, generator=generator))
    return backbone


def run(
    backbone: FluxBackbone, vocabularies: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[str, ConceptStream]]:
    noised = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = backbone.encode_prompts(["near", ""])
    modulation = backbone.concept_modulation(T, 3.5)
    with (
        reading(backbone.blocks, vocabularies, modulation) as streams,
        capturing(backbone.blocks, backbone.blocks, text_tokens=TEXT_LENGTH, image_tokens=16) as seen,
    ):
        velocity = backbone.forward(noised, T, prompts, 3.5)
    return velocity, seen, streams


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()


def rms_norm(layer: nn.Module, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight


def modulate(norm: nn.Module, x: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
    """AdaLN-zero: the modulated input, and what remains of the six chunks: gate, shift, scale, gate."""
    shift, scale, *rest = linear(norm.linear, torch.nn.functional.silu(condition)).chunk(6)
    return layer_norm(x) * (1 + scale) + shift, rest


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Each pair of neighbouring channels, turned by its token's angle."""
    turned = torch.stack((-x[:, 1::2], x[:, 0::2]), dim=-1).flatten(1)
    return x * cosine + turned * sine


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (queries @ keys.T / keys.shape[-1] ** 0.5).softmax(-1) @ values


def slow_step(
    block: nn.Module, concepts: Tensor, condition: Tensor, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """One sample, one double block, head by head: o_x, o_c (Paper: Eq. 3), and the updated concepts."""
    attn, size = block.attn, block.attn.head_dim
    image, _ = modulate(block.norm1, inputs["image"], inputs["temb"])
    text, _ = modulate(block.norm1_context, inputs["text"], inputs["temb"])
    normed, (gate, shift, scale, mlp_gate) = modulate(block.norm1_context, concepts, condition)
    cosine, sine = inputs["cosine"], inputs["sine"]
    heads_x, heads_c = [], []
    for head in range(attn.heads):
        part = slice(head * size, (head + 1) * size)
        q_x = rms_norm(attn.norm_q, linear(attn.to_q, image)[:, part])
        k_x = rms_norm(attn.norm_k, linear(attn.to_k, image)[:, part])
        v_x = linear(attn.to_v, image)[:, part]
        k_t = rms_norm(attn.norm_added_k, linear(attn.add_k_proj, text)[:, part])
        v_t = linear(attn.add_v_proj, text)[:, part]
        q_c = rms_norm(attn.norm_added_q, linear(attn.add_q_proj, normed)[:, part])
        k_c = rms_norm(attn.norm_added_k, linear(attn.add_k_proj, normed)[:, part])
        v_c = linear(attn.add_v_proj, normed)[:, part]
        # Concepts and text stand at position (0, 0, 0), which is also where the first image token stands.
        at_zero = (cosine[:1], sine[:1])
        k_x, q_x = (
            rotate(k_x, cosine[TEXT_LENGTH:], sine[TEXT_LENGTH:]),
            rotate(q_x, cosine[TEXT_LENGTH:], sine[TEXT_LENGTH:]),
        )
        k_t, q_c, k_c = rotate(k_t, *at_zero), rotate(q_c, *at_zero), rotate(k_c, *at_zero)
        heads_x.append(attend(q_x, torch.cat((k_t, k_x)), torch.cat((v_t, v_x))))
        heads_c.append(attend(q_c, torch.cat((k_c, k_x)), torch.cat((v_c, v_x))))
    o_x, o_c = torch.cat(heads_x, dim=-1), torch.cat(heads_c, dim=-1)
    concepts = concepts + gate * linear(attn.to_add_out, o_c)
    hidden = torch.nn.functional.gelu(
        linear(block.ff_context.net[0].proj, layer_norm(concepts) * (1 + scale) + shift), approximate="tanh"
    )
    return o_x, o_c, concepts + mlp_gate * linear(block.ff_context.net[2], hidden)


def test_scores_follow_the_equations_through_all_blocks(deep: FluxBackbone) -> None:
    """Against a second implementation that knows neither ours nor diffusers' modules, only their weights."""
    recorded: dict[int, dict[str, Tensor]] = {}
    handles = [
        block.register_forward_pre_hook(
            lambda _m, _a, kw, at=index: recorded.__setitem__(at, kw), with_kwargs=True
        )
        for index, block in enumerate(deep._transformer.transformer_blocks)
    ]
    embedded = deep.embed_concepts(WORDS)
    _, _, streams = run(deep, {"words": embedded})
    for handle in handles:
        handle.remove()
    stream, condition = streams["words"], deep.concept_modulation(T, 3.5)
    assert list(stream.scores) == ["double.0", "double.1", "double.2"]
    for sample in range(2):
        concepts = embedded
        for index, block in enumerate(deep._transformer.transformer_blocks):
            call = recorded[index]
            inputs = {
                "image": call["hidden_states"][sample],
                "text": call["encoder_hidden_states"][sample],
                "temb": call["temb"][sample],
                "cosine": call["image_rotary_emb"][0],
                "sine": call["image_rotary_emb"][1],
            }
            o_x, o_c, concepts = slow_step(block, concepts, condition[sample], inputs)
            scores = stream.scores[f"double.{index}"][sample]
            torch.testing.assert_close(scores, o_c @ o_x.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stream.tokens[sample], concepts, rtol=1e-4, atol=1e-5)
    assert stream.scores["double.2"].std() > 1e-3


def test_the_image_is_bit_identical_with_and_without_concepts(deep: FluxBackbone) -> None:
    plain_velocity, plain, _ = run(deep, {})
    vocabularies = {"a": deep.embed_concepts(WORDS), "b": deep.embed_concepts(("near", "far"))}
    velocity, seen, _ = run(deep, vocabularies)
    assert torch.equal(velocity, plain_velocity)
    for address in deep.blocks:
        assert torch.equal(seen[address], plain[address])


def test_vocabularies_do_not_see_each_other(deep: FluxBackbone) -> None:
    first, second = deep.embed_concepts(WORDS), deep.embed_concepts(("near", "far"))
    _, _, together = run(deep, {"first": first, "second": second})
    _, _, alone = run(deep, {"first": first})
    for address, scores in alone["first"].scores.items():
        assert torch.equal(together["first"].scores[address], scores)


def test_concepts_of_one_vocabulary_see_each_other_but_not_their_order(deep: FluxBackbone) -> None:
    _, _, streams = run(
        deep,
        {
            "forward": deep.embed_concepts(WORDS),
            "backward": deep.embed_concepts(WORDS[::-1]),
            "fewer": deep.embed_concepts(WORDS[:2]),
        },
    )
    forward, backward, fewer = (streams[name].scores["double.2"] for name in ("forward", "backward", "fewer"))
    torch.testing.assert_close(forward, backward.flip(1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(forward[:, :2], fewer, rtol=1e-3, atol=1e-4)


def test_hooks_are_gone_afterwards(deep: FluxBackbone) -> None:
    run(deep, {"words": deep.embed_concepts(WORDS)})
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in deep._transformer.modules()
    )


def test_scores_are_float32_in_a_bfloat16_model(tiny_flux_folder: Path) -> None:
    backbone = load_backbone(describe(str(tiny_flux_folder)), dtype="bfloat16")
    assert isinstance(backbone, FluxBackbone)
    _, _, streams = run(backbone, {"words": backbone.embed_concepts(WORDS)})
    assert {scores.dtype for scores in streams["words"].scores.values()} == {torch.float32}


def test_compiled_double_blocks_are_refused(tiny_flux_folder: Path) -> None:
    backbone = load_backbone(describe(str(tiny_flux_folder)))
    assert isinstance(backbone, FluxBackbone)
    backbone.blocks["double.1"].block.compile(backend="eager")
    with pytest.raises(BackboneError, match="uncompiled double blocks"):
        run(backbone, {"words": backbone.embed_concepts(WORDS)})


def test_maps_are_the_mean_of_softmaxes_over_concepts() -> None:
    scores = 3 * torch.randn(2, 4, 3, 5, 6, 7)
    maps = concept_maps(scores)
    exponentials = (scores.double() - scores.double().amax(dim=3, keepdim=True)).exp()
    shares = exponentials / exponentials.sum(dim=3, keepdim=True)
    expected = sum(shares[:, t, block] for t in range(4) for block in range(3)) / 12
    torch.testing.assert_close(maps.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 6, 7))
