"""Taps see what blocks put out, in whatever form, and leave the model as it was."""

from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock
from torch import Tensor, nn

from mmdiff_cache.backbones.base import BlockSlot
from mmdiff_cache.backbones.flux import FluxBackbone
from mmdiff_cache.errors import BackboneError
from mmdiff_cache.extraction.taps import BlockCall, capturing, image_part, observing
from tests.tiny_flux import TEXT_LENGTH

TEXT, IMAGE = 3, 5


def run(backbone: FluxBackbone) -> Tensor:
    noised = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return backbone.forward(noised, torch.tensor([0.5, 0.1]), backbone.encode_prompts(["", "near"]), 3.5)


def test_every_block_can_be_tapped_and_gives_what_a_hook_sees(tiny_backbone: FluxBackbone) -> None:
    hooked: dict[str, Tensor] = {}
    handles = [
        slot.block.register_forward_hook(
            lambda _m, _i, out, at=address: hooked.__setitem__(at, out[1].clone())
        )
        for address, slot in tiny_backbone.blocks.items()
    ]
    plain = run(tiny_backbone)
    for handle in handles:
        handle.remove()
    with capturing(
        tiny_backbone.blocks, tiny_backbone.blocks, text_tokens=TEXT_LENGTH, image_tokens=16
    ) as seen:
        tapped = run(tiny_backbone)
    assert torch.equal(plain, tapped)
    assert list(seen) == list(tiny_backbone.info.blocks)
    for address, tensor in seen.items():
        assert torch.equal(tensor, hooked[address])


def test_the_model_is_restored_also_after_an_error(tiny_backbone: FluxBackbone) -> None:
    before = list(tiny_backbone._transformer.modules())

    def fail(call: BlockCall) -> None:
        raise BackboneError(call.address)

    with (
        observing(tiny_backbone.blocks, ["single.2"], fail),
        pytest.raises(BackboneError, match=r"single\.2"),
    ):
        run(tiny_backbone)
    after = list(tiny_backbone._transformer.modules())
    assert len(before) == len(after)
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_several_observers_see_the_block_itself(tiny_backbone: FluxBackbone) -> None:
    calls: list[tuple[str, BlockCall]] = []
    address = "double.1"
    with (
        observing(tiny_backbone.blocks, [address], lambda call: calls.append(("inner", call))),
        observing(tiny_backbone.blocks, [address], lambda call: calls.append(("outer", call))),
    ):
        run(tiny_backbone)
    assert [name for name, _ in calls] == ["inner", "outer"]
    assert all(call.block is tiny_backbone.blocks[address].block for _, call in calls)
    assert tiny_backbone.blocks[address].container[1] is tiny_backbone.blocks[address].block


def test_what_is_captured_keeps_nothing_else_alive(tiny_backbone: FluxBackbone) -> None:
    """A block's image tokens are a view into its stream of text and image; the copy must not be."""
    with capturing(tiny_backbone.blocks, ["single.0"], text_tokens=TEXT_LENGTH, image_tokens=16) as seen:
        run(tiny_backbone)
    kept = seen["single.0"]
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_every_known_form_of_output_gives_the_image_tokens() -> None:
    text, image = torch.randn(2, TEXT, 4), torch.randn(2, IMAGE, 4)
    for output in ((text, image), [text, image], (None, image), torch.cat((text, image), dim=1), image):
        assert torch.equal(image_part(output, TEXT, IMAGE), image)


@pytest.mark.parametrize(
    "output",
    [
        (torch.zeros(2, IMAGE, 4), torch.zeros(2, TEXT, 4)),
        torch.zeros(2, IMAGE + 1, 4),
        torch.zeros(2, TEXT, 4),
        torch.zeros(IMAGE, 4),
        (torch.zeros(2, IMAGE, 4), None),
        "nothing",
    ],
)
def test_any_other_form_is_refused_rather_than_misread(output: object) -> None:
    with pytest.raises(
        BackboneError, match="a block must return 5 image tokens, alone or after 3 text tokens"
    ):
        image_part(output, TEXT, IMAGE)


def test_blocks_that_return_one_stream_are_read_by_their_text_length() -> None:
    """Chroma's single blocks return text and image in one tensor, as FLUX's own did before diffusers 0.35."""
    torch.manual_seed(0)
    block = ChromaSingleTransformerBlock(dim=32, num_attention_heads=2, attention_head_dim=16).eval()
    container = nn.ModuleList([block])
    blocks = {"single.0": BlockSlot(block=block, container=container, index=0)}
    stream, modulation = torch.randn(2, TEXT + IMAGE, 32), torch.randn(2, 3, 32)
    with torch.no_grad(), capturing(blocks, blocks, text_tokens=TEXT, image_tokens=IMAGE) as seen:
        output = container[0](hidden_states=stream, temb=modulation)
    assert isinstance(output, Tensor)
    assert torch.equal(seen["single.0"], output[:, TEXT:])


def test_taps_stay_outside_compiled_blocks(tiny_flux_folder: Path) -> None:
    """A tap wraps its block: what is compiled is the block, and the block is never touched."""
    from mmdiff_cache.backbones.registry import describe, load_backbone

    backbone = load_backbone(describe(str(tiny_flux_folder)))
    slot = backbone.blocks["single.1"]
    with capturing(backbone.blocks, ["single.1"], text_tokens=TEXT_LENGTH, image_tokens=16):
        assert not slot.block._forward_hooks
        assert not slot.block._forward_pre_hooks
        assert slot.container[1].inner is slot.block
