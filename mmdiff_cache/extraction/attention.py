"""What the readers of a block's attention share: heads apart, normalised, rotated."""

from typing import Any, cast

from diffusers.models.embeddings import apply_rotary_emb
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmdiff_cache.errors import BackboneError

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of all tokens of a pass, image tokens last."""


def check_uncompiled(block: nn.Module) -> None:
    """Raise BackboneError for a compiled block, which never calls the hooks that are put in later."""
    if getattr(block, "_compiled_call_impl", None) is not None:
        raise BackboneError(
            "concept maps and cross-attention need uncompiled double blocks; compile the single blocks only"
        )


def head_size(attn: Any) -> int:
    """Channels of one head of an attention module."""
    return int(attn.head_dim if hasattr(attn, "head_dim") else attn.inner_dim // attn.heads)


def split_heads(
    norm: nn.Module | None, projected: Float[Tensor, "B S C"], size: int
) -> Float[Tensor, "B heads S head_size"]:
    """A projection with its heads apart, each normalised where the block does so."""
    split = rearrange(projected, "B S (heads head_size) -> B S heads head_size", head_size=size)
    return rearrange(split if norm is None else norm(split), "B S heads head_size -> B heads S head_size")


def rotated(
    heads: Float[Tensor, "B heads S head_size"], rotary: Rotary | None, tokens: slice
) -> Float[Tensor, "B heads S head_size"]:
    """Turned by the angles of these tokens; untouched in a model without rotary embedding."""
    if rotary is None:
        return heads
    return cast(Tensor, cast(Any, apply_rotary_emb)(heads, tuple(part[tokens] for part in rotary)))
