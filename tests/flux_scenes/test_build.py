"""The pipeline out of nothing: whole words as tokens, a round trip through the disk, a picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from mmdiff_cache.flux_scenes.build import Architecture, build_pipeline, load_pipeline, save_pipeline
from mmdiff_cache.flux_scenes.sample import draw
from mmdiff_cache.flux_scenes.tokens import clip_tokenizer, t5_tokenizer
from mmdiff_cache.scenes import VOCABULARY, render_scene

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn as they load


def test_every_word_is_one_token_and_others_fall_into_pieces() -> None:
    words, pooled = t5_tokenizer(VOCABULARY, 48), clip_tokenizer(VOCABULARY, 48)
    for word in VOCABULARY:
        assert len(words(word)["input_ids"]) == 2, word  # the word and the end
        assert len(words(word.capitalize())["input_ids"]) == 2, word
        assert len(pooled(word)["input_ids"]) == 3, word  # start, the word, the end
    unknown = words("zebra's")["input_ids"]
    assert words.unk_token_id not in unknown
    assert len(unknown) == 9
    assert pooled("zebra")["input_ids"].count(pooled.eos_token_id) == 1


def test_every_caption_fits_the_text_length() -> None:
    words = t5_tokenizer(VOCABULARY, 48)
    lengths = [len(words(render_scene("pretrain", index, 16).caption)["input_ids"]) for index in range(120)]
    assert max(lengths) <= Architecture().text_length


def test_the_real_architecture_has_what_flux_scenes_promises() -> None:
    arch = Architecture()
    assert (arch.double_blocks, arch.single_blocks, arch.width) == (4, 12, 128)
    with torch.device("meta"):
        from mmdiff_cache.flux_scenes.build import build_transformer

        transformer = build_transformer(arch)
    assert transformer.config["guidance_embeds"]
    assert transformer.config["in_channels"] == 16


def test_saved_pipeline_loads_as_any_flux_and_draws_the_same(
    tmp_path: Path, tiny_pipeline: FluxPipeline
) -> None:
    before = {key: value.clone() for key, value in tiny_pipeline.transformer.state_dict().items()}
    assert save_pipeline(tiny_pipeline, tmp_path / "flux") < 25e6
    for key, value in tiny_pipeline.transformer.state_dict().items():
        assert torch.equal(value, before[key])  # saving in fp16 leaves the original alone
    loaded = load_pipeline(tmp_path / "flux")
    assert {part.dtype for part in (loaded.text_encoder, loaded.text_encoder_2, loaded.transformer)} == {
        torch.float32
    }
    assert loaded.tokenizer.model_max_length == loaded.tokenizer_2.model_max_length == 48
    assert loaded.vae_scale_factor == 4
    pictures = [draw(one, ["a red ball on sand"], [7], size=32, steps=2) for one in (tiny_pipeline, loaded)]
    assert pictures[0].shape == (1, 32, 32, 3)
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 3


def test_the_same_seed_builds_the_same_weights() -> None:
    from tests.flux_scenes.conftest import TINY

    first, second = (build_pipeline(TINY, seed=3).transformer.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
