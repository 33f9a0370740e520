"""What every test runs under: one thread a process, sleeping OpenMP threads, and no model hub."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tests.typecheck  # noqa: F401  # before the import hook of pyproject.toml looks for it

if TYPE_CHECKING:
    from mmdiff_cache.backbones.flux import FluxBackbone

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background


@pytest.fixture(scope="session")
def tiny_flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved FluxPipeline of the real classes at tiny size: 2 double, 4 single blocks, 4 x 4 tokens."""
    from tests.tiny_flux import save_tiny_flux

    return save_tiny_flux(tmp_path_factory.mktemp("backbones") / "tiny-flux")


@pytest.fixture(scope="session")
def tiny_dinov3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved DINOv3ViTModel of the real class at tiny size: 4 blocks, 24 channels, patches of 16 pixels."""
    from tests.tiny_dinov3 import save_tiny_dinov3

    return save_tiny_dinov3(tmp_path_factory.mktemp("encoders") / "tiny-dinov3")


@pytest.fixture(scope="session")
def learnable_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 16 + 4 samples whose labels can be read off its features; see tests/learnable.py."""
    from tests.learnable import write_store

    return write_store(tmp_path_factory.mktemp("stores") / "blocks" / "flux-tiny")


@pytest.fixture(scope="session")
def tiny_backbone(tiny_flux_folder: Path) -> "FluxBackbone":
    """The tiny pipeline loaded whole, in float32 on the CPU. Tests leave it as they find it."""
    from mmdiff_cache.backbones.flux import FluxBackbone
    from mmdiff_cache.backbones.registry import describe, load_backbone

    backbone = load_backbone(describe(str(tiny_flux_folder)), device="cpu")
    assert isinstance(backbone, FluxBackbone)
    return backbone
