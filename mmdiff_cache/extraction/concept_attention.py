"""Concept maps: a stream of concept tokens that reads the image stream and is never read by it.

In every double block the concepts attend to the image and to each other, with the weights of the text stream,
and are then updated as text is. How strongly an image token belongs to a concept is the product of their
attention outputs, both before the output projections. Paper: Sec. 3.2, Eq. 3-4, after ConceptAttention.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmdiff_cache.backbones.base import BlockSlot
from mmdiff_cache.extraction.attention import Rotary, check_uncompiled, head_size, rotated, split_heads
from mmdiff_cache.extraction.taps import BlockCall, observing


@dataclass(kw_only=True, slots=True)
class ConceptStream:
    """The state of one vocabulary during one pass; `scores` fills up block by block."""

    tokens: Float[Tensor, "B K C"]
    scores: dict[str, Float[Tensor, "B K N"]] = field(default_factory=dict[str, Tensor])
    """Raw o_x . o_c in float32, by block address."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageAttention:
    """What a double block's attention computed for the image tokens, heads apart."""

    keys: Float[Tensor, "B heads N head_size"]
    """Normalised and rotated."""
    values: Float[Tensor, "B heads N head_size"]
    outputs: Float[Tensor, "B N C"]
    """o_x: heads joined, before the output projection."""


@contextmanager
def reading(
    blocks: Mapping[str, BlockSlot],
    vocabularies: Mapping[str, Float[Tensor, "K C"]],
    modulation: Float[Tensor, "B C"],
) -> Generator[dict[str, ConceptStream]]:
    """Run the concept streams of all vocabularies beside the next forward pass, which they leave untouched.

    `vocabularies` holds the tokens that each stream starts with, `modulation` the conditioning of all of
    them. Every stream is on its own: concepts of one vocabulary do not see those of another.
    """
    streams = {
        name: ConceptStream(tokens=tokens.expand(len(modulation), -1, -1))
        for name, tokens in vocabularies.items()
    }
    doubles = {address: slot for address, slot in blocks.items() if address.startswith("double.")}
    recorders = {address: _AttentionRecorder(slot.block) for address, slot in doubles.items()}

    def advance(call: BlockCall) -> None:
        image = recorders[call.address].take(call.inputs.get("image_rotary_emb"))
        for stream in streams.values():
            attended, stream.tokens = update_concepts(call.block, stream.tokens, modulation, image)
            stream.scores[call.address] = attended.to(torch.float32) @ image.outputs.to(torch.float32).mT

    with ExitStack() as stack:
        for recorder in recorders.values():
            stack.enter_context(recorder.attached())
        stack.enter_context(observing(doubles, doubles, advance))
        yield streams


def update_concepts(
    block: nn.Module,
    concepts: Float[Tensor, "B K C"],
    modulation: Float[Tensor, "B C"],
    image: ImageAttention,
) -> tuple[Float[Tensor, "B K C"], Float[Tensor, "B K C"]]:
    """One double block's step: the attention outputs o_c (Paper: Eq. 3) and the updated concept tokens."""
    parts = cast(Any, block)
    last = bool(getattr(parts, "context_pre_only", False))  # SD3's last block, which has no text output
    normed, *rest = (
        (parts.norm1_context(concepts, modulation),)
        if last
        else parts.norm1_context(concepts, emb=modulation)
    )
    # Concepts stand at position zero like text, where the rotary embedding is the identity.
    size = head_size(parts.attn)
    queries = split_heads(parts.attn.norm_added_q, parts.attn.add_q_proj(normed), size)
    keys = split_heads(parts.attn.norm_added_k, parts.attn.add_k_proj(normed), size)
    values = split_heads(None, parts.attn.add_v_proj(normed), size)
    attended = F.scaled_dot_product_attention(
        queries, torch.cat((keys, image.keys), dim=2), torch.cat((values, image.values), dim=2)
    )
    outputs = rearrange(attended, "B heads K head_size -> B K (heads head_size)")
    if last:
        return outputs, concepts
    gate_attention, shift, scale, gate_mlp = rest
    concepts = concepts + gate_attention[:, None] * parts.attn.to_add_out(outputs)
    modulated = parts.norm2_context(concepts) * (1 + scale[:, None]) + shift[:, None]
    return outputs, concepts + gate_mlp[:, None] * parts.ff_context(modulated)


def concept_maps(scores: Float[Tensor, "B T block K h w"]) -> Float[Tensor, "B K h w"]:
    """Softmax over the concepts at each block and timestep, then the mean over both. Paper: Eq. 4."""
    return scores.softmax(dim=3).mean(dim=(1, 2))


class _AttentionRecorder:
    """Keeps what a block's attention computes for the image, so that concepts need not compute it again."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._seen: dict[str, Tensor] = {}

    @contextmanager
    def attached(self) -> Generator[None]:
        """Record while the context lasts. A compiled block hides its insides and raises BackboneError."""
        check_uncompiled(self._block)
        attn = cast(Any, self._block).attn
        handles = [
            attn.to_k.register_forward_hook(self._keep_output("keys")),
            attn.to_v.register_forward_hook(self._keep_output("values")),
            attn.to_out[0].register_forward_pre_hook(self._keep_input("outputs")),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def take(self, rotary: Rotary | None) -> ImageAttention:
        """What the last call computed; `rotary` are the angles of all tokens, image tokens last, if any."""
        attn, seen = cast(Any, self._block).attn, self._seen
        image_tokens, size = seen["outputs"].shape[1], head_size(attn)
        keys = split_heads(attn.norm_k, seen["keys"], size)
        image = ImageAttention(
            keys=rotated(keys, rotary, slice(-image_tokens, None)),
            values=split_heads(None, seen["values"], size),
            outputs=seen["outputs"],
        )
        seen.clear()
        return image

    def _keep_output(self, what: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._seen[what] = output

        return keep

    def _keep_input(self, what: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._seen[what] = inputs[0]

        return keep
