"""From stored scores and attention to maps: over which blocks and timesteps is the reader's choice."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .schema import StoreSchema


def concept_maps(
    scores: NDArray[np.float32],
    blocks: Sequence[int],
    temperature: float = 1.0,
    reading: Literal["softmax_then_mean", "mean_then_softmax"] = "softmax_then_mean",
) -> NDArray[np.float32]:
    """Raw scores [B T block K h w] to maps [B K h w]: softmax over concepts, mean over blocks and timesteps.

    `blocks` are positions on the block axis; scores are divided by the temperature first. Paper: Sec. 3.2,
    Eq. 4, which averages the shares; `mean_then_softmax` averages the scores.
    """
    chosen = scores[:, :, list(blocks)]
    if reading == "mean_then_softmax":
        return _shares(chosen.mean(axis=(1, 2), dtype=np.float32), temperature, axis=1)
    return _shares(chosen, temperature, axis=3).mean(axis=(1, 2), dtype=np.float32)


def _shares(scores: NDArray[np.float32], temperature: float, axis: int) -> NDArray[np.float32]:
    """Softmax over one axis."""
    powers = np.exp((scores - scores.max(axis=axis, keepdims=True)) / np.float32(temperature))
    return powers / powers.sum(axis=axis, keepdims=True)


def attention_maps(weights: NDArray[np.float32], blocks: Sequence[int]) -> NDArray[np.float32]:
    """Averaged attention weights [B T block h w] to maps, a channel a block: mean over timesteps, times h w.

    A stored value is the weight of one text token, of the order of one in all tokens; times the number of
    image tokens it is of the order of 1, whatever the resolution.
    """
    rows, columns = weights.shape[-2:]
    return weights[:, :, list(blocks)].mean(axis=1, dtype=np.float32) * np.float32(rows * columns)


def mapped_blocks(schema: StoreSchema, vocabulary: str) -> tuple[str, ...]:
    """The double blocks that a store's maps of a vocabulary average."""
    stored = next(v for v in schema.vocabularies if v.name == vocabulary)
    return stored.map_blocks or stored.blocks


def map_blocks(schema: StoreSchema, vocabulary: str) -> list[int]:
    """Their positions on the block axis."""
    stored = next(v for v in schema.vocabularies if v.name == vocabulary)
    return [stored.blocks.index(block) for block in mapped_blocks(schema, vocabulary)]


def attention_blocks(schema: StoreSchema) -> tuple[str, ...]:
    """The blocks whose attention is read by default: those of the concept maps, else all that are stored."""
    mapped = {block for vocabulary in schema.vocabularies for block in mapped_blocks(schema, vocabulary.name)}
    return tuple(block for block in schema.cross_attention if block in mapped) or schema.cross_attention
