"""A tiny flux-scenes of the real classes, and a tiny rendered corpus."""

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from mmdiff_cache.flux_scenes import corpus as corpus_module
from mmdiff_cache.flux_scenes.build import Architecture, build_pipeline
from mmdiff_cache.flux_scenes.corpus import Corpus, encode_corpus, render_corpus

TINY = Architecture(
    double_blocks=1,
    single_blocks=2,
    heads=2,
    head_width=16,
    rotary_axes=(4, 6, 6),
    autoencoder_widths=(8, 8, 8),
    text_width=32,
    text_layers=1,
    pooled_width=32,
    pooled_layers=1,
)


@pytest.fixture(scope="session")
def tiny_pipeline() -> FluxPipeline:
    """Untrained; tests leave it as they find it."""
    return build_pipeline(TINY)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: FluxPipeline) -> Corpus:
    """Twelve scenes of 32 px in two shards, with latents at 32 and 16 px."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "SHARD", 6)
        corpus = Corpus(folder=tmp_path_factory.mktemp("corpus"), size=32, count=12)
        render_corpus(corpus, workers=1)
        for size in (32, 16):
            encode_corpus(corpus, tiny_pipeline.vae, size=size, device=torch.device("cpu"))
    return corpus


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test sees shards of six scenes, as the tiny corpus has."""
    monkeypatch.setattr(corpus_module, "SHARD", 6)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """An empty working folder."""
    return tmp_path / "work"
