"""The lossy tier: maps as int8 with a scale a channel, so that few huge channels cost the others nothing."""

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.config import Codec

LARGEST = 127


def stored_as(codec: Codec) -> dict[str, str]:
    """What a codec adds to a store's identity: nothing, unless it changes values."""
    return {"stored_as": "int8, a scale a channel"} if codec == "int8" else {}


def quantise(values: NDArray[np.float16]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A map [h w C] as whole numbers [h w C] and the worth of their unit [C]; 0 for a channel of zeros.

    Symmetric: a channel's largest magnitude becomes 127. The error of a value is at most half its channel's
    unit, and the rounding of the product to float16.
    """
    wide = values.astype(np.float32)
    scale = np.abs(wide).max(axis=(0, 1)) / np.float32(LARGEST)
    steps = np.divide(wide, scale, out=np.zeros_like(wide), where=scale > 0)
    return np.rint(steps, out=steps).astype(np.int8), scale


def restore(steps: NDArray[np.int8], scale: NDArray[np.float32], out: NDArray[np.float16]) -> None:
    """Put the float16 values of a quantised map into `out` [h w C]."""
    out[...] = np.multiply(steps, scale, dtype=np.float32)


def round_trip(hidden_states: NDArray[np.float16]) -> NDArray[np.float16]:
    """What an int8 store gives back for hidden states [... h w C]."""
    out = np.empty_like(hidden_states)
    for position in np.ndindex(*hidden_states.shape[:-3]):
        restore(*quantise(hidden_states[position]), out[position])
    return out
