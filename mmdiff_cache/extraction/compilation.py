"""Compiling the blocks of a transformer one by one: a graph or three, where the whole would be one of all."""

import textwrap
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from torch._dynamo.exc import TorchDynamoException

from mmdiff_cache.backbones.base import BlockSlot
from mmdiff_cache.errors import BackboneError


def compile_blocks(
    blocks: Mapping[str, BlockSlot], *, read_inside: bool, compiler: str = "inductor"
) -> tuple[str, ...]:
    """Compile every block when it is first called; returns the addresses of those that will be.

    Blocks of one kind and layout of inputs share one graph, and taps stay outside of it.
    With `read_inside` the double blocks stay as they are, for the concept stream and the reader of
    cross-attention hook what is in them. Values differ from those of plain blocks by rounding.
    """
    chosen = [address for address in blocks if not (read_inside and address.startswith("double."))]
    for address in chosen:
        blocks[address].block.compile(backend=compiler)
    return tuple(chosen)


@contextmanager
def compile_errors() -> Generator[None]:
    """Turn a failure of the compiler, which comes with the first forward, into a BackboneError."""
    try:
        yield
    except TorchDynamoException as error:
        said = textwrap.shorten(str(error), 160, placeholder=" ...")
        raise BackboneError(
            f"the blocks cannot be compiled here ({said}); run again with --no-compile"
        ) from error
