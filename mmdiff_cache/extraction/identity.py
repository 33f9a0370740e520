"""What a run says of itself in the manifest: what must be equal, and what is for information."""

from importlib.metadata import version
from typing import Any

import torch

from mmdiff_cache.backbones.weights import hash_weights, locate
from mmdiff_cache.datasets.transforms import FIT
from mmdiff_cache.extraction.plan import ExtractionPlan
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.quantise import stored_as

PACKAGES = ("mmdiff-cache", "torch", "diffusers", "transformers", "numpy", "pillow", "zarr", "numcodecs")
"""Their versions may change features, pictures or bytes by rounding."""
NOT_STORED = ("store", "device", "attention", "compile", "text_pass")
"""Fields of the configuration that say where a run takes place, not what it makes."""


def build_manifest(plan: ExtractionPlan) -> Manifest:
    """The manifest of a planned run.

    Reads the weight files to hash them, and fetches a hub backbone that is not here yet. Raises BackboneError
    when weights are missing.
    """
    config = plan.config
    return Manifest(
        identity={
            "pipeline": plan.backbone.architecture.pipeline,
            "weights_sha256": hash_weights(locate(plan.backbone, download=True)),
            "dtype": config.dtype,
            "quantisation": config.quantisation,
            "resolution": config.resolution,
            "fit": FIT,
            "noise": config.noise.to_json(),
            "prompts": plan.prompts.identity,
            "guidance": config.guidance,
            "text_length": config.text_length,
            **stored_as(config.codec),
        },
        schema=plan.schema,
        splits=plan.samples,
        provenance=_provenance(plan),
        config={name: value for name, value in config.to_json().items() if name not in NOT_STORED},
    )


def _provenance(plan: ExtractionPlan) -> dict[str, Any]:
    on_gpu = plan.cost.device == "cuda"
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "backbone": plan.backbone.name,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": None if on_gpu else torch.get_num_threads(),
        "attention_backend": plan.config.attention,
        "compiled": plan.config.compile,
        "batch_size": plan.config.batch_size,
    }
