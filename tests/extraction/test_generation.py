"""Pictures drawn from prompts against plain calls of diffusers' pipelines with hooks, bit for bit."""

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from torch import Tensor, nn

from mmdiff_cache.backbones.base import Backbone
from mmdiff_cache.backbones.flux import FluxBackbone
from mmdiff_cache.backbones.registry import describe, load_backbone
from mmdiff_cache.config import CaptureMode, GenerationConfig, NoiseConfig
from mmdiff_cache.errors import BackboneError
from mmdiff_cache.extraction.extractor import Extractor
from mmdiff_cache.extraction.generation import Painter
from mmdiff_cache.records import PictureRequest, draw_noise, draw_start
from tests.tiny_flux import TEXT_LENGTH
from tests.tiny_sd3 import T5_LENGTH, save_tiny_sd3

SIDE, LATENT, STEPS = 32, (4, 8, 8), 3
TIMESTEPS = (0.6, 0.001)
REQUESTS = [
    PictureRequest(sample_id="one", prompt="near a box", seed=0),
    PictureRequest(sample_id="two", prompt="", seed=7),
]


@pytest.fixture(scope="module")
def flux(tiny_flux_folder: Path) -> FluxPipeline:
    return quiet(FluxPipeline.from_pretrained(tiny_flux_folder))


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sd3(tmp_path_factory.mktemp("sd3") / "tiny-sd3")


@pytest.fixture(scope="module")
def sd3(sd3_folder: Path) -> StableDiffusion3Pipeline:
    return quiet(StableDiffusion3Pipeline.from_pretrained(sd3_folder))


@pytest.fixture(scope="module")
def sd3_backbone(sd3_folder: Path) -> Backbone:
    return load_backbone(describe(str(sd3_folder)), device="cpu")


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def painter(backbone: Backbone, mode: CaptureMode = "renoise", **choices: Any) -> Painter:
    single = bool(backbone.info.architecture.single_blocks)
    guidance = 3.5 if backbone.info.guidance is not None else None
    extractor = Extractor(
        backbone,
        layers=("double.1", "single.3") if single else ("double.0", "double.3"),
        timesteps=TIMESTEPS,
        vocabularies={"two": ("near", "far")},
        noise=NoiseConfig(),
        guidance=guidance,
    )
    config = GenerationConfig(mode=mode, **{"steps": STEPS, "guidance": guidance} | choices)
    return Painter(extractor, config, resolution=SIDE)


def starts() -> Tensor:
    """The starting latents [B c H_f W_f], drawn here by the documented rule."""
    return torch.from_numpy(np.stack([draw_start(r.seed, r.sample_id, LATENT) for r in REQUESTS]))


def packed(latent: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(latent, len(latent), *latent.shape[1:])


@torch.no_grad()
def embeds(pipeline: Any, prompts: Sequence[str], prefix: str = "") -> dict[str, Tensor]:
    """Prompts encoded one by one by the pipeline, as arguments of its call."""
    if isinstance(pipeline, FluxPipeline):
        found = [
            pipeline.encode_prompt(prompt, None, max_sequence_length=TEXT_LENGTH)[:2] for prompt in prompts
        ]
    else:
        options = {"do_classifier_free_guidance": False, "max_sequence_length": T5_LENGTH}
        found = [pipeline.encode_prompt(prompt, None, None, **options)[::2] for prompt in prompts]
    tokens, pooled = (torch.cat(parts) for parts in zip(*found, strict=True))
    return {f"{prefix}prompt_embeds": tokens, f"{prefix}pooled_prompt_embeds": pooled}


class Watched:
    """The image tokens that blocks of a pipeline put out in each of its passes, by hooks."""

    def __init__(self, *blocks: nn.Module) -> None:
        self.passes: list[list[Tensor]] = [[] for _ in blocks]
        self._blocks = blocks

    def __enter__(self) -> "Watched":
        self._stack = ExitStack()
        for seen, block in zip(self.passes, self._blocks, strict=True):
            hook = block.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out[1].clone()))
            self._stack.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def at(self, passes: Sequence[int]) -> Tensor:
        """[B T L N C]."""
        return torch.stack(
            [torch.stack([seen[number] for number in passes], dim=1) for seen in self.passes], dim=2
        )


def watch(pipeline: Any) -> Watched:
    model = pipeline.transformer
    if isinstance(pipeline, FluxPipeline):
        return Watched(model.transformer_blocks[1], model.single_transformer_blocks[3])
    return Watched(model.transformer_blocks[0], model.transformer_blocks[3])


@torch.no_grad()
def draw_flux(pipeline: FluxPipeline, **options: Any) -> Any:
    call = {
        "num_inference_steps": STEPS,
        "guidance_scale": 3.5,
        "latents": packed(starts()).to(pipeline.transformer.dtype),
        "output_type": "np",
        **embeds(pipeline, [r.prompt for r in REQUESTS]),
    }
    return pipeline(height=SIDE, width=SIDE, **(call | options)).images


@torch.no_grad()
def draw_sd3(pipeline: StableDiffusion3Pipeline, **options: Any) -> Any:
    call = {
        "num_inference_steps": STEPS,
        "latents": starts(),
        "output_type": "np",
        **embeds(pipeline, [r.prompt for r in REQUESTS]),
    }
    return pipeline(height=SIDE, width=SIDE, **(call | options)).images


def as_bytes(images: np.ndarray) -> np.ndarray:
    return (images * 255).round().astype(np.uint8)


def images_of(drawn: Painter) -> np.ndarray:
    return np.stack([sample.image for sample in drawn(REQUESTS)[0]])


def same_features(drawn: Painter, expected: Tensor) -> bool:
    """Whether the hidden states are those expected [B T L N C], cast to float16."""
    found = drawn(REQUESTS)[1].hidden_states[:, 0]
    return found.reshape(expected.shape).tobytes() == expected.to(torch.float16).numpy().tobytes()


def test_pictures_are_those_of_fluxpipeline(tiny_backbone: FluxBackbone, flux: FluxPipeline) -> None:
    expected = as_bytes(draw_flux(flux))
    assert len({image.tobytes() for image in expected}) == 2
    for mode in ("renoise", "nearest"):
        np.testing.assert_array_equal(images_of(painter(tiny_backbone, mode)), expected)


def test_looking_changes_no_bit_of_the_latent(tiny_backbone: FluxBackbone, sd3_backbone: Backbone) -> None:
    for backbone in (tiny_backbone, sd3_backbone):
        for scale in (1.0, 3.0):
            drawn = painter(backbone, "nearest", true_cfg_scale=scale)
            seen, unseen = (drawn.draw(REQUESTS, look=look) for look in (True, False))
            assert sorted(seen.observed) == sorted(set(drawn.steps))
            assert not unseen.observed
            assert torch.equal(seen.latents, unseen.latents)


def test_bfloat16_steps_as_the_pipeline_does(tiny_flux_folder: Path) -> None:
    backbone = load_backbone(describe(str(tiny_flux_folder)), device="cpu", dtype="bfloat16")
    pipeline = quiet(FluxPipeline.from_pretrained(tiny_flux_folder)).to(torch.bfloat16)
    expected = draw_flux(pipeline, output_type="latent", num_inference_steps=5)
    drawn = painter(backbone, steps=5).draw(REQUESTS, look=False)
    assert drawn.latents.dtype == torch.bfloat16
    assert torch.equal(packed(drawn.latents), expected)


def test_a_shift_by_resolution_is_the_pipelines(tiny_flux_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_flux_folder, tmp_path / "shifted")
    change_scheduler(folder, use_dynamic_shifting=True, shift=3.0)
    backbone = load_backbone(describe(str(folder)), device="cpu")
    expected = as_bytes(draw_flux(quiet(FluxPipeline.from_pretrained(folder))))
    np.testing.assert_array_equal(images_of(painter(backbone)), expected)
    plain = painter(backbone).sampler().sigmas[:-1]
    assert not torch.allclose(plain, torch.linspace(1, 1 / STEPS, STEPS), atol=0.05)
    inserted = painter(backbone, "trajectory").sampler().sigmas
    assert inserted.tolist() == sorted({*plain.tolist(), *np.float32(TIMESTEPS).tolist(), 0.0}, reverse=True)


def change_scheduler(folder: Path, **values: Any) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_trajectory_goes_through_the_wanted_levels(
    tiny_backbone: FluxBackbone, flux: FluxPipeline
) -> None:
    """The pipeline is given the merged levels by hand; its tiny scheduler shifts nothing."""
    merged = [1.0, 2 / 3, 0.6, 1 / 3, 0.001]
    with watch(flux) as seen:
        expected = draw_flux(flux, sigmas=merged, num_inference_steps=len(merged))
    drawn = painter(tiny_backbone, "trajectory")
    np.testing.assert_array_equal(images_of(drawn), as_bytes(expected))
    assert same_features(drawn, seen.at([2, 4]))
    assert drawn.sigmas == pytest.approx(TIMESTEPS, abs=1e-7)


def test_inserted_levels_change_the_picture(tiny_backbone: FluxBackbone) -> None:
    latents = [
        painter(tiny_backbone, mode).draw(REQUESTS, look=True).latents for mode in ("trajectory", "nearest")
    ]
    assert (latents[0] - latents[1]).norm() > 1e-3 * latents[1].norm()


def test_nearest_captures_the_steps_there_are_and_says_which(
    tiny_backbone: FluxBackbone, flux: FluxPipeline
) -> None:
    """The levels are 1, 2/3 and 1/3."""
    with watch(flux) as seen:
        draw_flux(flux)
    drawn = painter(tiny_backbone, "nearest")
    assert drawn.steps == [1, 2]
    assert same_features(drawn, seen.at([1, 2]))
    sigmas = drawn(REQUESTS)[1].sigmas
    assert sigmas is not None
    np.testing.assert_allclose(sigmas, [[2 / 3, 1 / 3]] * 2, rtol=1e-6)


@torch.no_grad()
def test_renoising_is_what_a_real_picture_gets(tiny_backbone: FluxBackbone, flux: FluxPipeline) -> None:
    """The final latent of a plain run, noised by hand, through the transformer in one batch."""
    final = FluxPipeline._unpack_latents(draw_flux(flux, output_type="latent"), SIDE, SIDE, 4)
    noise = torch.from_numpy(np.stack([draw_noise(0, r.sample_id, 0, LATENT) for r in REQUESTS]))
    times = torch.tensor(TIMESTEPS)[None, :, None, None, None]
    noised = ((1 - times) * final[:, None] + times * noise[:, None]).flatten(0, 1)
    encoded = embeds(flux, [r.prompt for r in REQUESTS])
    texts = {name: value.repeat_interleave(2, 0) for name, value in encoded.items()}
    with watch(flux) as seen:
        flux.transformer(
            hidden_states=packed(noised),
            timestep=torch.tensor(TIMESTEPS).repeat(2),
            guidance=torch.full((4,), 3.5),
            pooled_projections=texts["pooled_prompt_embeds"],
            encoder_hidden_states=texts["prompt_embeds"],
            txt_ids=torch.zeros(TEXT_LENGTH, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(4, 4, 4, "cpu", torch.float32),
        )
    expected = seen.at([0]).reshape(2, 2, 2, 16, 32)
    drawn = painter(tiny_backbone)
    assert same_features(drawn, expected)
    assert drawn.sigmas == TIMESTEPS


def test_the_noise_of_renoising_is_not_the_one_drawn_from() -> None:
    noises = [draw(0, "one", *rest, LATENT) for draw, rest in ((draw_noise, (0,)), (draw_start, ()))]
    correlation = np.corrcoef([noise.ravel() for noise in noises])[0, 1]
    assert abs(correlation) < 0.2


def test_the_pass_that_knows_the_prompt_is_kept_of_two(
    tiny_backbone: FluxBackbone, flux: FluxPipeline
) -> None:
    """FLUX calls the model twice a step, first with the prompt."""
    with watch(flux) as seen:
        expected = draw_flux(flux, true_cfg_scale=2.5, **embeds(flux, ["far", "far"], prefix="negative_"))
    drawn = painter(tiny_backbone, "nearest", true_cfg_scale=2.5, negative_prompt="far")
    np.testing.assert_array_equal(images_of(drawn), as_bytes(expected))
    assert len(seen.passes[0]) == 2 * STEPS
    assert same_features(drawn, seen.at([2, 4]))
    assert not same_features(drawn, seen.at([3, 5]))


@pytest.mark.parametrize("mode", ["nearest", "renoise"])
def test_the_half_that_knows_the_prompt_is_kept_of_sd3(
    mode: CaptureMode, sd3_backbone: Backbone, sd3: StableDiffusion3Pipeline
) -> None:
    """SD3 runs [negative, prompts] as one batch; its schedule is shifted."""
    with watch(sd3) as seen:
        expected = draw_sd3(sd3, guidance_scale=4.0, **embeds(sd3, ["far", "far"], prefix="negative_"))
    drawn = painter(sd3_backbone, mode, true_cfg_scale=4.0, negative_prompt="far")
    np.testing.assert_array_equal(images_of(drawn), as_bytes(expected))
    if mode == "nearest":
        both = seen.at(drawn.steps)
        assert len(both) == 4
        assert same_features(drawn, both[2:])
        assert not same_features(drawn, both[:2])


def test_sd3_without_contrast_is_one_pass(sd3_backbone: Backbone, sd3: StableDiffusion3Pipeline) -> None:
    with watch(sd3) as seen:
        expected = draw_sd3(sd3, guidance_scale=1.0)
    drawn = painter(sd3_backbone, "nearest")
    np.testing.assert_array_equal(images_of(drawn), as_bytes(expected))
    assert same_features(drawn, seen.at(drawn.steps))


def test_concept_scores_are_those_of_the_captured_step(tiny_backbone: FluxBackbone) -> None:
    """Capturing one timestep alone gives its scores; the two steps differ."""
    drawn = painter(tiny_backbone, "trajectory")
    scores = drawn(REQUESTS)[1].concept_scores["two"]
    assert scores.shape == (2, 1, 2, 2, 2, 4, 4)
    seen = drawn.draw(REQUESTS, look=True).observed
    for place, step in enumerate(drawn.steps):
        np.testing.assert_array_equal(scores[:, 0, place], seen[step].concept_scores["two"].numpy())
    assert not np.allclose(scores[:, 0, 0], scores[:, 0, 1])


@pytest.mark.parametrize("mode", ["trajectory", "renoise", "nearest"])
def test_a_picture_does_not_depend_on_its_batch_mates(mode: CaptureMode, tiny_backbone: FluxBackbone) -> None:
    drawn = painter(tiny_backbone, mode)
    together = drawn.draw(REQUESTS, look=False).latents
    turned = drawn.draw(REQUESTS[::-1], look=False).latents.flip(0)
    for number, request in enumerate(REQUESTS):
        alone = drawn.draw([request], look=False).latents
        for other in (alone[0], turned[number]):
            assert (other - together[number]).norm() <= 1e-5 * together[number].norm()
    assert not torch.allclose(together[0], together[1])


def test_a_schedule_that_needs_more_than_the_latent_is_refused(
    tiny_flux_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_flux_folder, tmp_path / "noisy")
    change_scheduler(folder, stochastic_sampling=True)
    with pytest.raises(BackboneError, match="without stochastic_sampling; noisy has a FlowMatchEuler"):
        painter(load_backbone(describe(str(folder)), device="cpu"))
