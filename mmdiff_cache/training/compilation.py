"""Compiling what a training spends its time in: the blocks of the aggregators, one graph for all of them."""

import textwrap
from collections.abc import Generator
from contextlib import contextmanager

from mmdiff_cache.errors import TrainingError
from mmdiff_cache.models.mmdiff import MMDiff
from mmdiff_cache.models.unified import Unified
from mmdiff_cache.training.build import Network


def compile_model(network: Network) -> None:
    """Have a network's blocks compiled when they are first called; one of pixels has none, so it stays.

    Weights keep their names, so that checkpoints are the same with and without.
    """
    model = network.trunk if isinstance(network, Unified) else network
    if isinstance(model, MMDiff):
        model.compile_blocks()


@contextmanager
def compile_errors() -> Generator[None]:
    """Turn a failure of the compiler, which comes with the first step, into a TrainingError."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        said = textwrap.shorten(str(error), 160, placeholder=" ...")
        raise TrainingError(
            f"the model cannot be compiled here ({said}); run again with --set compile=false"
        ) from error
