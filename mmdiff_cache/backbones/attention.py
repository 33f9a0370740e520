"""The kernel that computes attention: chosen by name, and tried out before a run relies on it."""

import textwrap
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.attention_processor import JointAttnProcessor2_0, XFormersJointAttnProcessor
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.utils.import_utils import is_xformers_available

from mmdiff_cache.backbones.info import NATIVE, XFORMERS
from mmdiff_cache.errors import BackboneError, ConfigError

SUGGESTED = (
    NATIVE,
    "_native_flash",
    "_native_efficient",
    "_native_cudnn",
    "flash",
    "_flash_3",
    "sage",
    XFORMERS,
)
"""Backends that are tried when another fails; those that fetch a kernel or compile one are not."""
PROBE_TEXT, PROBE_IMAGE = 32, 64
"""Tokens of the trial."""


def use_attention(transformer: Any, name: str) -> None:
    """Let all blocks compute attention by the named backend, once it has done a small forward.

    Availability checks of packages are not enough: a backend built for another torch passes them and fails in
    the forward. Raises ConfigError for a name that nobody knows, BackboneError for a backend that does not
    work on this device, in this dtype and head size; the message names those that do.
    """
    if name not in (known := [backend.value for backend in AttentionBackendName]):
        raise ConfigError(f"attention must be one of {', '.join(known)}, got {name!r}")
    failure = _try(transformer, name)
    if failure is None:
        return
    working = [other for other in SUGGESTED if other != name and _try(transformer, other) is None]
    _select(transformer, NATIVE)
    said = textwrap.shorten(f"{type(failure).__name__}: {failure}", 160, placeholder=" ...")
    raise BackboneError(
        f"attention {name!r} does not work with {transformer.dtype} on {transformer.device} ({said}); "
        f"these do: {', '.join(working)}"
    ) from failure


def _try(transformer: Any, name: str) -> Exception | None:
    """Select a backend and run it; what went wrong, if anything did."""
    try:
        _select(transformer, name)
        _probe(transformer)
    except Exception as error:  # kernels and their packages raise whatever they like
        return error
    return None


def _select(transformer: Any, name: str) -> None:
    if isinstance(transformer, SD3Transformer2DModel):
        transformer.set_attn_processor(_sd3_processor(name))
        return
    # Setting a model's backend changes the choice of every other model in the process; this puts it back.
    with attention_backend(NATIVE):
        transformer.set_attention_backend(name)


def _sd3_processor(name: str) -> Any:
    """SD3's own processors take no part in diffusers' choice of a backend."""
    if name == NATIVE:
        return JointAttnProcessor2_0()
    if name != XFORMERS:
        raise BackboneError(f"SD3 computes attention by {NATIVE} or {XFORMERS} only")
    if not is_xformers_available():
        raise BackboneError("xformers is not installed; pip install 'mmdiff-cache[xformers]'")
    return XFormersJointAttnProcessor()


@torch.inference_mode()
def _probe(transformer: Any) -> None:
    attention = transformer.transformer_blocks[0].attn
    text, image = (
        torch.randn(1, tokens, attention.query_dim).to(transformer.device, transformer.dtype)
        for tokens in (PROBE_TEXT, PROBE_IMAGE)
    )
    outputs = attention(hidden_states=image, encoder_hidden_states=text)
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise BackboneError("its outputs are not finite")
