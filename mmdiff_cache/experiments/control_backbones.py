"""Backbones of the same shape to compare with: one never trained, and ones that were trained less."""

import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from mmdiff_cache.backbones.info import BackboneInfo
from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.backbones.weights import locate, weight_bytes
from mmdiff_cache.config import data_folder
from mmdiff_cache.errors import BackboneError

FLUX = "FluxPipeline"
LARGEST = 1 << 30
"""Bytes of a pipeline's weights up to which a copy is made unasked."""
SEED = 0

logger = logging.getLogger(__name__)


def random_backbone(name: str) -> str:
    """The folder of a pipeline with the same VAE and text encoders, but a transformer of initial weights.

    A small FLUX whose weights are here gets it when first asked for, under data/backbones/, as diffusers
    initialises it, from a fixed seed. Of others nothing is made: the folder is then no backbone, and what
    needs it says so.
    """
    info = describe(name)
    folder = data_folder().absolute() / "backbones" / f"{info.name}-random"
    if not folder.exists() and _can_be_made(info):
        _make(locate(info), folder)
    return str(folder)


def younger_backbone(name: str, share: float) -> str:
    """The folder of one that was trained for a share of the steps, such as flux-scenes-10 for a tenth.

    It has to be trained: `pipelines/flux_scenes.py --share 0.1` writes the bundled backbone's there. Until
    then the folder is no backbone, and what needs it says so.
    """
    return str(data_folder().absolute() / "backbones" / f"{describe(name).name}-{100 * share:g}")


def _can_be_made(info: BackboneInfo) -> bool:
    if info.architecture.pipeline != FLUX:
        return False
    try:
        return weight_bytes(locate(info)) <= LARGEST
    except BackboneError:
        return False


def _make(source: Path, folder: Path) -> None:
    """Write it whole or not at all."""
    import torch
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    from mmdiff_cache.flux_scenes.build import load_pipeline, save_pipeline
    from mmdiff_cache.pretrained import quiet_loading

    logger.info("writing a transformer of initial weights to %s", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        quiet_loading(),
        torch.random.fork_rng(devices=[]),
        TemporaryDirectory(dir=folder.parent, prefix=".random-") as aside,
    ):
        pipeline = load_pipeline(source)
        torch.manual_seed(SEED)
        transformer = FluxTransformer2DModel.from_config(pipeline.transformer.config)
        pipeline.register_modules(transformer=transformer)
        save_pipeline(pipeline, Path(aside) / folder.name)
        os.replace(Path(aside) / folder.name, folder)
