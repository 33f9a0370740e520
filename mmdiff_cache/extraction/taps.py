"""Reading the outputs of single transformer blocks while the model runs."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mmdiff_cache.backbones.base import BlockSlot
from mmdiff_cache.errors import BackboneError


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCall:
    """One call of one block, as an observer sees it; tensors are the model's own and must not be changed."""

    address: str
    block: nn.Module
    inputs: Mapping[str, Any]
    output: Any


Observer = Callable[[BlockCall], None]


class _Tap(nn.Module):
    """Stands in a block's place and shows its calls to an observer.

    It wraps the block instead of hooking it: forward hooks are traced into a compiled block, once for every
    layer, until the compiler gives up.
    """

    def __init__(self, address: str, slot: BlockSlot, observer: Observer) -> None:
        super().__init__()
        self.inner = slot.container[slot.index]
        self._address, self._block, self._observer = address, (slot.block,), observer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        self._observer(BlockCall(address=self._address, block=self._block[0], inputs=kwargs, output=output))
        return output


@contextmanager
def observing(
    blocks: Mapping[str, BlockSlot], addresses: Iterable[str], observer: Observer
) -> Generator[None]:
    """Show every call of the named blocks to `observer`; the model is as it was when the context ends."""
    with ExitStack() as stack:
        for address in addresses:
            slot = blocks[address]
            stack.callback(slot.container.__setitem__, slot.index, slot.container[slot.index])
            slot.container[slot.index] = _Tap(address, slot, observer)
        yield


@contextmanager
def capturing(
    blocks: Mapping[str, BlockSlot], addresses: Iterable[str], *, text_tokens: int, image_tokens: int
) -> Generator[dict[str, Float[Tensor, "B N C"]]]:
    """Collect copies of the image tokens that the named blocks put out, by address."""
    captured: dict[str, Tensor] = {}

    def keep(call: BlockCall) -> None:
        # A block's image tokens are a view of its whole stream: uncopied, they would keep the text alive too.
        captured[call.address] = image_part(call.output, text_tokens, image_tokens).clone()

    with observing(blocks, addresses, keep):
        yield captured


def image_part(output: Any, text_tokens: int, image_tokens: int) -> Float[Tensor, "B N C"]:
    """The image tokens in a block's output, whatever the form in which this block returns it.

    Known forms: a pair (text, image), one stream of text followed by image, or the image alone. The form is
    told by type and length, for it differs between blocks and between releases of diffusers.
    Raises BackboneError for any other.
    """
    if isinstance(output, (tuple, list)):
        stream, starts = output[-1], {image_tokens: 0}
    else:
        stream, starts = output, {image_tokens: 0, text_tokens + image_tokens: text_tokens}
    if not isinstance(stream, Tensor) or stream.ndim != 3 or stream.shape[1] not in starts:
        found = tuple(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__
        raise BackboneError(
            f"a block must return {image_tokens} image tokens, alone or after {text_tokens} text tokens; "
            f"got {found}"
        )
    return stream[:, starts[stream.shape[1]] :]
