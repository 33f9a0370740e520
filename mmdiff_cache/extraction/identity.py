"""What a run says of itself in the manifest: what must be equal, and what is for information."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from mmdiff_cache.backbones.weights import hash_weights, locate
from mmdiff_cache.encoders.registry import describe_encoder
from mmdiff_cache.encoders.weights import hash_encoder
from mmdiff_cache.encoders.weights import locate as locate_encoder
from mmdiff_cache.extraction.drawing import generation_identity
from mmdiff_cache.extraction.plan import ExtractionPlan
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.quantise import stored_as
from mmdiff_cache.store.schema import StoreSchema

PACKAGES = ("mmdiff-cache", "torch", "diffusers", "transformers", "numpy", "pillow", "zarr", "numcodecs")
"""Their versions may change features, pictures or bytes by rounding."""
NOT_STORED = ("store", "device", "attention", "compile", "text_pass")
"""Fields of the configuration that say where a run takes place, not what it makes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What of a process decides features by rounding. Equal ones give equal bits."""

    versions: Mapping[str, str]
    """Of PACKAGES, by name."""
    device: str
    """`cpu`, or the name of the GPU."""
    threads: int | None
    """Of torch, on the CPU; None on a GPU."""
    attention_backend: str


def surroundings(device: str) -> Surroundings:
    """Those of this process, for a device `cpu` or `cuda`."""
    on_gpu = device == "cuda"
    return Surroundings(
        versions={name: version(name) for name in PACKAGES},
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        threads=None if on_gpu else torch.get_num_threads(),
        attention_backend=os.environ.get("DIFFUSERS_ATTN_BACKEND", "native"),
    )


def build_manifest(plan: ExtractionPlan, where: Surroundings | None = None) -> Manifest:
    """The manifest of a planned run, which takes place in this process or in those of `where`.

    Reads the weight files to hash them, and fetches what of them is on the hub and not here yet. Raises
    BackboneError when weights are missing.
    """
    config = plan.config
    folder = locate(plan.backbone, download=True)
    drawn = (
        {} if config.generation is None else {"generation": generation_identity(config.generation, folder)}
    )
    return Manifest(
        identity={
            "pipeline": plan.backbone.architecture.pipeline,
            "weights_sha256": hash_weights(folder),
            "dtype": config.dtype,
            "quantisation": config.quantisation,
            "resolution": config.resolution,
            "fit": config.fit,
            "noise": config.noise.to_json(),
            "prompts": plan.prompts.identity,
            "guidance": config.guidance,
            "text_length": config.text_length,
            **stored_as(config.codec),
            **drawn,
        },
        schema=_with_encoders(plan),
        splits=plan.samples,
        provenance=_provenance(plan, where or surroundings(plan.cost.device)),
        config={name: value for name, value in config.to_json().items() if name not in NOT_STORED},
    )


def _with_encoders(plan: ExtractionPlan) -> StoreSchema:
    """The schema, saying also which encoders they are."""
    folders = [locate_encoder(describe_encoder(name), download=True) for name in plan.config.discriminative]
    encoders = zip(plan.schema.discriminative, folders, strict=True)
    return replace(
        plan.schema,
        discriminative=tuple(
            replace(encoder, weights_sha256=hash_encoder(folder)) for encoder, folder in encoders
        ),
    )


def _provenance(plan: ExtractionPlan, where: Surroundings) -> dict[str, Any]:
    chosen = {"attention_backend": plan.config.attention, "compiled": plan.config.compile}
    return {**asdict(where), **chosen, "backbone": plan.backbone.name, "batch_size": plan.config.batch_size}
