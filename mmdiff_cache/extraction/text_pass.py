"""Text encoders that do not fit beside the transformer go first, alone, and leave their vectors on disk.

The vectors lie in the store's staging folder, where the next run removes what an interrupted one left.
"""

import gc
import logging
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch

from mmdiff_cache.backbones.registry import load_text_encoders
from mmdiff_cache.backbones.text import SavedText, TextSource, save_text
from mmdiff_cache.config import filled
from mmdiff_cache.errors import DataError
from mmdiff_cache.extraction.plan import ExtractionPlan
from mmdiff_cache.extraction.variants import mirrored
from mmdiff_cache.store.files import staging_folder, storage_errors
from mmdiff_cache.store.records import Partition

logger = logging.getLogger(__name__)


@contextmanager
def text_of(plan: ExtractionPlan, pending: Iterable[Partition]) -> Generator[TextSource | None]:
    """The vectors of all prompts and concepts of these partitions; None where the encoders stay loaded.

    For the holder of the store's lock. What was written is removed when the context ends.
    """
    if plan.config.text_pass == "together":
        yield None
        return
    with storage_errors(plan.store):
        folder = staging_folder(plan.store, "text")
    try:
        yield encode(plan, pending, folder)
    finally:
        shutil.rmtree(folder)


def encode(plan: ExtractionPlan, pending: Iterable[Partition], folder: Path) -> SavedText:
    """Load the text encoders alone, write the vectors of `text_of` into a folder, and let them go."""
    config, prompts = plan.config, distinct_prompts(plan, pending)
    words = {word for words in filled(config.concepts).values() for word in words}
    encoders = load_text_encoders(
        plan.backbone, device=config.device, dtype=config.dtype, text_length=config.text_length
    )
    logger.info("encoding %d prompts and %d concepts before the transformer", len(prompts), len(words))
    with storage_errors(plan.store):
        save_text(encoders, folder, prompts=prompts, words=sorted(words))
    device = encoders.device
    del encoders
    gc.collect()  # a pipeline's parts refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return SavedText(folder, device=device)


def distinct_prompts(plan: ExtractionPlan, pending: Iterable[Partition]) -> list[str]:
    """Every prompt of these partitions once, in order; pictures are read only where the prompt is theirs."""
    found: dict[str, None] = {}
    for partition in pending:
        for index in range(partition.start, partition.stop):
            sample_id = plan.samples[partition.split][index]
            prompt = plan.prompts.of_id(sample_id)
            if prompt is None:
                try:
                    sample = plan.dataset.load(partition.split, plan.positions[partition.split][index])
                    prompt = plan.prompts.prompt(sample)
                except DataError:  # the worker will say so of the sample in its turn
                    continue
            found[prompt] = None
    if plan.config.flip:
        found |= dict.fromkeys(map(mirrored, found))
    drawn = plan.config.generation
    if drawn is not None and drawn.contrasts:
        found[drawn.negative_prompt or ""] = None
    return list(found)
