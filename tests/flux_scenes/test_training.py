"""Rectified flow and distillation at tiny size: losses fall, times are as promised, killed runs go on."""

import copy
import os
import signal
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor
from torch.nn import functional as F

from mmdiff_cache.errors import CheckpointError
from mmdiff_cache.flux_scenes.attention import RecomputedAttention
from mmdiff_cache.flux_scenes.autoencoder import AutoencoderRecipe, train_autoencoder
from mmdiff_cache.flux_scenes.build import build_autoencoder, build_pipeline
from mmdiff_cache.flux_scenes.corpus import Corpus, read_latents, read_prompts
from mmdiff_cache.flux_scenes.distill import DistillRecipe, train_guidance
from mmdiff_cache.flux_scenes.prompts import PromptBank, PromptMix
from mmdiff_cache.flux_scenes.rectified_flow import FlowRecipe, Lesson, Phase, open_lesson, train_flow
from mmdiff_cache.flux_scenes.velocity import TimeMix, of_pipeline, pack, position_ids, squared_errors
from mmdiff_cache.scenes import HELD_OUT_PAIRS
from tests.flux_scenes.conftest import TINY

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of autocast inside diffusers' norms
CPU = torch.device("cpu")


def recipe(*steps: int, batch: int = 4) -> FlowRecipe:
    phases = tuple(Phase(size=size, steps=n, batch=batch) for size, n in zip((16, 32), steps, strict=False))
    return FlowRecipe(phases=phases, compiled=False, warmup=2, validate_every=3, learning_rate=3e-3)


def lesson(pipeline: FluxPipeline, corpus: Corpus) -> Lesson:
    return open_lesson(pipeline, corpus, PromptMix(), CPU)


def weights(pipeline: FluxPipeline) -> dict[str, Tensor]:
    return of_pipeline(pipeline).state_dict()


def test_times_are_small_often_enough() -> None:
    times = TimeMix().draw(20_000, torch.Generator().manual_seed(0))
    assert 0 < times.min() < times.max() < 1
    assert (times < 0.02).float().mean() >= 0.05
    assert 0.45 < times.mean() < 0.5
    assert (times > 0.9).float().mean() > 0.04


def test_attention_for_training_equals_the_stock_one() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(RecomputedAttention.apply, inputs, atol=1e-4, rtol=1e-3)
    stock = torch.autograd.grad(F.scaled_dot_product_attention(*inputs).square().sum(), inputs)
    ours = torch.autograd.grad(RecomputedAttention.apply(*inputs).square().sum(), inputs)
    for expected, found in zip(stock, ours, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_positions_of_small_pictures_span_the_full_grid() -> None:
    assert torch.equal(position_ids(256)[17], torch.tensor([0.0, 1.0, 1.0]))
    assert torch.equal(position_ids(64)[0], torch.tensor([0.0, 0.5, 0.5]))
    assert torch.equal(position_ids(64)[-1], torch.tensor([0.0, 14.5, 14.5]))


def test_a_few_steps_reduce_the_loss_on_one_batch() -> None:
    torch.manual_seed(0)
    pipeline = build_pipeline(TINY)
    model = of_pipeline(pipeline).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    clean, noise = pack(torch.randn(4, 4, 8, 8)), pack(torch.randn(4, 4, 8, 8))
    from mmdiff_cache.flux_scenes.prompts import tokenise

    tokens = tokenise(pipeline, ["a red ball on sand", "a blue box", "", "snow at night"])[torch.arange(4)]
    losses: list[float] = []
    for _ in range(40):
        loss = squared_errors(model, clean, noise, torch.full((4,), 0.5), torch.ones(4), tokens).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_a_killed_run_goes_on_to_the_same_weights(
    work: Path, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut, resumed = (build_pipeline(TINY) for _ in range(3))
    data = lesson(whole, tiny_corpus)
    train_flow(whole, data, data, recipe(3, 4), work=work / "whole")

    seen = 0
    clean = Lesson.clean

    def stop_in_the_fifth_step(self: Lesson, size: int, scenes: Tensor, flips: Tensor) -> Tensor:
        nonlocal seen
        seen += len(scenes) == 4  # validation batches are larger
        if seen == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return clean(self, size, scenes, flips)

    monkeypatch.setattr(Lesson, "clean", stop_in_the_fifth_step)
    with pytest.raises(KeyboardInterrupt):
        train_flow(cut, data, data, recipe(3, 4), work=work / "cut")
    monkeypatch.setattr(Lesson, "clean", clean)
    train_flow(resumed, data, data, recipe(3, 4), work=work / "cut")
    expected = weights(whole)
    for key, value in weights(resumed).items():
        assert torch.equal(value, expected[key]), key
    assert not torch.equal(
        weights(cut)["transformer.x_embedder.weight"], expected["transformer.x_embedder.weight"]
    )


def test_a_checkpoint_of_another_architecture_is_refused(work: Path, tiny_corpus: Corpus) -> None:
    pipeline = build_pipeline(TINY)
    data = lesson(pipeline, tiny_corpus)
    train_flow(pipeline, data, data, recipe(1), work=work)
    import dataclasses

    other = build_pipeline(dataclasses.replace(TINY, single_blocks=3))
    with pytest.raises(CheckpointError, match="other choices"):
        train_flow(other, data, data, recipe(1), work=work)


def test_distillation_moves_towards_guided_predictions(work: Path, tiny_corpus: Corpus) -> None:
    pipeline = build_pipeline(TINY)
    data = lesson(pipeline, tiny_corpus)
    before = copy.deepcopy(weights(pipeline))
    train_guidance(pipeline, data, DistillRecipe(steps=2, batch=4, size=16, compiled=False), work=work)
    after = weights(pipeline)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(torch.isfinite(value).all() for value in after.values())


def test_prompts_are_dropped_as_often_as_asked(tiny_pipeline: FluxPipeline, tiny_corpus: Corpus) -> None:
    bank = PromptBank(
        tiny_pipeline, read_prompts(tiny_corpus), PromptMix(empty=0.5, scene=0.0, capitalised=0.0)
    )
    drawn = bank.draw(torch.zeros(400, dtype=torch.long), torch.Generator().manual_seed(0))
    empty = (drawn.words == bank.empty(1).words).all(1)
    assert 0.4 < empty.float().mean() < 0.6
    assert (drawn.words[~empty] == bank.captions(torch.tensor([0])).words).all()


def test_autoencoder_learns_and_sets_its_scale(work: Path, tiny_corpus: Corpus) -> None:
    work.mkdir()
    model = build_autoencoder(TINY)
    train_autoencoder(
        model, tiny_corpus, AutoencoderRecipe(steps=8, batch=4, warmup=2), work=work, device=CPU
    )
    assert model.config["scaling_factor"] != 1.0
    assert (work / "checkpoint" / "weights.safetensors").exists()


def test_corpus_has_latents_of_both_mirrors_and_no_held_out_pair(tiny_corpus: Corpus) -> None:
    latents = read_latents(tiny_corpus, size=32)
    assert latents.shape == (12, 2, 4, 8, 8)
    assert torch.isfinite(latents).all()
    for prompts in read_prompts(tiny_corpus):
        for colour, shape in HELD_OUT_PAIRS:
            words = prompts.caption.replace(",", " ").replace(".", " ").split()
            for at, word in enumerate(words[:-1]):
                assert not (word == colour and shape in words[at + 1 : at + 2]), prompts.caption
