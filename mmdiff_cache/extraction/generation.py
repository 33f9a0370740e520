"""Pictures drawn from prompts, with the features of the drawing or of the finished picture.

The loop is that of diffusers' own pipelines, with their scheduler: for the same schedule and starting noise a
picture is theirs bit for bit, and no other for being looked at. With true classifier-free guidance the model
runs twice a step; what is kept is the pass that was told the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mmdiff_cache.backbones.base import PromptEmbeddings, Sampler
from mmdiff_cache.config import GenerationConfig, filled
from mmdiff_cache.extraction.extractor import Captured, Extractor, Observed
from mmdiff_cache.records import FeatureBatch, PictureRequest, PreparedSample, draw_start

SAME_SIGMA = 1e-6
"""A noise level of the schedule that is as near as this to a wanted one is taken for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """What became of B requests."""

    latents: Float[Tensor, "B c H_f W_f"]
    """Final and clean, in the model's dtype."""
    observed: dict[int, Observed]
    """The passes that were looked at, by the number of their step."""


class Painter:
    """Draws pictures with an extractor's backbone, and captures what the extractor captures.

    A picture depends on its request alone. It is bit-identical for the same batch; across batch sizes latents
    agree to rounding, as features do (a relative L2 of 1e-6 in float32).
    """

    def __init__(self, extractor: Extractor, config: GenerationConfig, *, resolution: int) -> None:
        self.extractor, self.backbone = extractor, extractor.backbone
        self.layers, self.timesteps = extractor.layers, extractor.timesteps
        self.encoders, self.turn, self.profile = extractor.encoders, extractor.turn, extractor.profile
        self._config, self._resolution = config, resolution
        sampler = self.sampler()
        self.steps = nearest_steps(sampler, self.timesteps)
        """The step at which each timestep is captured while drawing."""
        captured = self.timesteps if config.mode == "renoise" else sampler.sigmas[self.steps].tolist()
        self.sigmas: tuple[float, ...] = tuple(captured)
        """The noise level at which each timestep is captured: t itself, but in mode `nearest`."""

    def sampler(self) -> Sampler:
        """A new scheduler, with the wanted noise levels among its own in mode `trajectory`."""
        sampler = self.backbone.sampler(filled(self._config.steps), self._resolution)
        if self._config.mode == "trajectory":
            insert_sigmas(sampler, filled(self._config.inserted))
        return sampler

    @torch.inference_mode()
    def __call__(self, requests: Sequence[PictureRequest]) -> tuple[list[PreparedSample], FeatureBatch]:
        """The pictures as samples, and their features. Values that are not finite do not raise."""
        afterwards = self._config.mode == "renoise"
        drawing = self.draw(requests, look=not afterwards)
        clean = drawing.latents.to(torch.float32)
        if afterwards:
            names, prompts = [r.sample_id for r in requests], [r.prompt for r in requests]
            captured = self.extractor.capture_latents(clean, names, prompts)
        else:
            captured = self._captured(clean, [drawing.observed[step] for step in self.steps])
        with self.profile.timing("VAE", self.backbone.device):
            images = self.backbone.decode_latent(clean).cpu().numpy()
        samples = [_sample(request, image) for request, image in zip(requests, images, strict=True)]
        sigmas = np.tile(np.array(self.sigmas, np.float32), (len(requests), 1))
        features, encoded = self.extractor.finish(captured), self.extractor.discriminative(samples)
        return samples, replace(features, sigmas=sigmas, discriminative=encoded)

    @torch.inference_mode()
    def draw(self, requests: Sequence[PictureRequest], *, look: bool) -> Drawing:
        """Run the sampler from each request's own noise; `look` observes the steps that are captured."""
        backbone = self.backbone
        shape = backbone.info.latent_shape(self._resolution)
        start = np.stack([draw_start(request.seed, request.sample_id, shape) for request in requests])
        latents = torch.from_numpy(start).to(backbone.device, backbone.dtype)
        with self.profile.timing("text", backbone.device):
            prompts = backbone.encode_prompts([request.prompt for request in requests])
        sampler, observed = self.sampler(), dict[int, Observed]()
        for step, timestep in enumerate(sampler.timesteps):
            t = backbone.sampler_time(sampler.sigmas[step])
            velocity, seen = self._velocity(latents, t, prompts, look=look and step in self.steps)
            if seen is not None:
                observed[step] = seen
            latents = sampler.step(velocity, timestep, latents, return_dict=False)[0]
        return Drawing(latents=latents, observed=observed)

    def _velocity(
        self,
        latents: Float[Tensor, "B c H_f W_f"],
        t: Float[Tensor, ""],
        prompts: PromptEmbeddings,
        *,
        look: bool,
    ) -> tuple[Float[Tensor, "B c H_f W_f"], Observed | None]:
        """The velocity of one step, and what was seen of the pass that was told the prompts."""
        config, batch = self._config, len(latents)
        if not config.contrasts:
            return self._pass(latents, t, prompts, look=look)
        with self.profile.timing("text", self.backbone.device):
            negative = self.backbone.encode_prompts([config.negative_prompt or ""] * batch)
        if self.backbone.contrast_in_one_pass:
            both, seen = self._pass(
                torch.cat((latents, latents)), t, negative.followed_by(prompts), look=look
            )
            away, towards = both.chunk(2)
            seen = None if seen is None else _rows(seen, batch)
        else:
            towards, seen = self._pass(latents, t, prompts, look=look)
            away, _ = self._pass(latents, t, negative, look=False)
        return away + filled(config.true_cfg_scale) * (towards - away), seen

    def _pass(
        self,
        latents: Float[Tensor, "B c H_f W_f"],
        t: Float[Tensor, ""],
        prompts: PromptEmbeddings,
        *,
        look: bool,
    ) -> tuple[Float[Tensor, "B c H_f W_f"], Observed | None]:
        times, guidance = t.expand(len(latents)), self._config.guidance
        with self.profile.timing("transformer", self.backbone.device):
            if not look:
                return self.backbone.forward(latents, times, prompts, guidance), None
            seen = self.extractor.observe(latents, times, prompts, guidance)
        return seen.velocity, seen

    def _captured(self, clean: Float[Tensor, "B c H_f W_f"], seen: Sequence[Observed]) -> Captured:
        """The passes of the drawing, one a timestep, as if they had been one batch."""
        return Captured(
            latents=self.backbone.pack(clean),
            hidden_states=torch.stack([one.hidden_states for one in seen], dim=1),
            concept_scores={
                name: torch.stack([one.concept_scores[name] for one in seen], dim=1)
                for name in self.extractor.vocabularies
            },
            cross_attention=_stacked([one.cross_attention for one in seen]),
        )


def insert_sigmas(sampler: Sampler, wanted: Sequence[float]) -> None:
    """Make a scheduler stop at every wanted noise level as well, exactly, whatever shift made its own."""
    own = sampler.sigmas[:-1].tolist()
    missing = [t for t in wanted if min(abs(t - sigma) for sigma in own) > SAME_SIGMA]
    merged = torch.tensor(sorted([*own, *missing], reverse=True), dtype=torch.float32)
    sampler.num_inference_steps = len(merged)
    sampler.sigmas = torch.cat((merged, torch.zeros(1))).to(sampler.sigmas.device)
    sampler.timesteps = sampler.sigmas[:-1] * sampler.config.num_train_timesteps


def nearest_steps(sampler: Sampler, wanted: Sequence[float]) -> list[int]:
    """The number of the step whose noise level is nearest to each wanted one."""
    own: list[float] = sampler.sigmas[:-1].tolist()
    return [min(range(len(own)), key=lambda step: abs(own[step] - t)) for t in wanted]


def _sample(request: PictureRequest, image: NDArray[np.uint8]) -> PreparedSample:
    return PreparedSample(
        sample_id=request.sample_id,
        image=image,
        prompt=request.prompt,
        labels={},
        original_labels={},
        content_hash=request.content_hash,
        generation_seed=request.seed,
    )


def _rows(seen: Observed, start: int) -> Observed:
    """The samples from `start` on, without the memory of those before."""
    return Observed(
        velocity=seen.velocity[start:].clone(),
        hidden_states=seen.hidden_states[start:].clone(),
        concept_scores={name: scores[start:].clone() for name, scores in seen.concept_scores.items()},
        cross_attention=None if seen.cross_attention is None else seen.cross_attention[start:].clone(),
    )


def _stacked(maps: Sequence[Tensor | None]) -> Tensor | None:
    there = [each for each in maps if each is not None]
    return torch.stack(there, dim=1) if there else None
