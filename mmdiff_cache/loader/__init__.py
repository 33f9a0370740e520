"""The store as torch tensors: a data set for any model of one's own, and the loader that training uses.

    data = CachedFeatureDataset("data/scenes/flux-scenes", split="train", layers=["single.4"])
    data[0]["hidden_states"]                 # float16 [T L h w C]
    for batch in make_loader(data, batch_size=8): ...

Only the (timestep, layer) chunks that are asked for are read. Batches are prefetched by threads of this
process, into memory that is used over and over: reading and decompressing release the interpreter's lock, and
no second process needs a copy of anything.
"""

from .batch import Batch, View, taken, view_of
from .dataset import CachedFeatureDataset, picture_values, side_by_side, usable_samples
from .inputs import (
    CROSS_ATTENTION,
    NO_CONCEPTS,
    WITHOUT_TRANSFORMER,
    Guide,
    Inputs,
    make_guide,
    plain_variant,
    settle,
)
from .memory import SampleMemory
from .order import batch_positions, batches_per_epoch, sample_order
from .prefetch import make_loader

__all__ = [
    "CROSS_ATTENTION",
    "NO_CONCEPTS",
    "WITHOUT_TRANSFORMER",
    "Batch",
    "CachedFeatureDataset",
    "Guide",
    "Inputs",
    "SampleMemory",
    "View",
    "batch_positions",
    "batches_per_epoch",
    "make_guide",
    "make_loader",
    "picture_values",
    "plain_variant",
    "sample_order",
    "settle",
    "side_by_side",
    "taken",
    "usable_samples",
    "view_of",
]
