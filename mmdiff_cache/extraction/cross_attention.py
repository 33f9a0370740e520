"""Averaged cross-attention: how much an image token attends to the prompt, over all its tokens and heads.

It is what concept maps are compared with. Paper: Tab. 5, row "+ Cross-attention maps"; Sec. 3.2. Attention
weights are never formed: with values of one for text and zero for the image, a block's own attention puts out
their sum over the text.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmdiff_cache.backbones.base import BlockSlot
from mmdiff_cache.extraction.attention import Rotary, check_uncompiled, head_size, rotated, split_heads
from mmdiff_cache.extraction.taps import BlockCall, observing

VALUE_CHANNELS = 8
"""Channels of the indicator values; kernels want a multiple of eight, and one would do."""


@contextmanager
def reading(blocks: Mapping[str, BlockSlot]) -> Generator[dict[str, Float[Tensor, "B N"]]]:
    """Collect the map of every double block during the next forward pass, which it leaves untouched.

    A map holds, for every image token, the mean over heads and text tokens of its attention weights, in
    float32; the weights of a token over text and image add up to one.
    """
    maps: dict[str, Tensor] = {}
    doubles = {address: slot for address, slot in blocks.items() if address.startswith("double.")}
    recorders = {address: _ProjectionRecorder(slot.block) for address, slot in doubles.items()}

    def read(call: BlockCall) -> None:
        maps[call.address] = recorders[call.address].take(call.inputs.get("image_rotary_emb"))

    with ExitStack() as stack:
        for recorder in recorders.values():
            stack.enter_context(recorder.attached())
        stack.enter_context(observing(doubles, doubles, read))
        yield maps


def attention_to_text(
    queries: Float[Tensor, "B heads N head_size"],
    text_keys: Float[Tensor, "B heads S head_size"],
    image_keys: Float[Tensor, "B heads N head_size"],
) -> Float[Tensor, "B N"]:
    """The mean weight of a text token, over heads and text tokens."""
    keys = torch.cat((text_keys, image_keys), dim=2)
    is_text = keys.new_zeros(*keys.shape[:3], VALUE_CHANNELS)
    is_text[:, :, : text_keys.shape[2]] = 1
    share = F.scaled_dot_product_attention(queries, keys, is_text, scale=queries.shape[-1] ** -0.5)
    return share[..., 0].to(torch.float32).mean(dim=1) / text_keys.shape[2]


class _ProjectionRecorder:
    """Keeps what a block's attention projects, before its norms."""

    def __init__(self, block: nn.Module) -> None:
        self._block, self._attn = block, cast(Any, block).attn
        self._seen: dict[str, Tensor] = {}

    @contextmanager
    def attached(self) -> Generator[None]:
        """Record while the context lasts. A compiled block raises BackboneError."""
        check_uncompiled(self._block)
        names = ("to_q", "to_k", "add_k_proj")
        handles = [getattr(self._attn, name).register_forward_hook(self._keep(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def take(self, rotary: Rotary | None) -> Float[Tensor, "B N"]:
        """The map of the last call; `rotary` are the angles of all tokens, image tokens last, if any."""
        attn, seen, size = self._attn, self._seen, head_size(self._attn)
        queries = split_heads(attn.norm_q, seen["to_q"], size)
        image_keys = split_heads(attn.norm_k, seen["to_k"], size)
        text_keys = split_heads(attn.norm_added_k, seen["add_k_proj"], size)
        seen.clear()
        image, text = slice(-queries.shape[2], None), slice(text_keys.shape[2])
        return attention_to_text(
            rotated(queries, rotary, image),
            rotated(text_keys, rotary, text),
            rotated(image_keys, rotary, image),
        )

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._seen[name] = output

        return keep
