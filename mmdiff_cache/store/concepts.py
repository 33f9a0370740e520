"""From the stored concept scores to maps: over which blocks and timesteps is the reader's choice."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .schema import StoreSchema


def concept_maps(scores: NDArray[np.float32], blocks: Sequence[int]) -> NDArray[np.float32]:
    """Raw scores [B T block K h w] to maps [B K h w]: softmax over concepts, mean over blocks and timesteps.

    `blocks` are positions on the block axis. Paper: Sec. 3.2, Eq. 4.
    """
    chosen = scores[:, :, list(blocks)]
    powers = np.exp(chosen - chosen.max(axis=3, keepdims=True))
    shares = powers / powers.sum(axis=3, keepdims=True)
    return shares.mean(axis=(1, 2), dtype=np.float32)


def map_blocks(schema: StoreSchema, vocabulary: str) -> list[int]:
    """Positions, on the block axis, of the double blocks that a store's maps average."""
    stored = next(v for v in schema.vocabularies if v.name == vocabulary)
    return [stored.blocks.index(block) for block in stored.map_blocks or stored.blocks]
