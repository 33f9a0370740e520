"""From pictures to features: noise them, run the backbone once, read the blocks, take stock of the values."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float16, Float32
from numpy.typing import NDArray
from torch import Tensor

from mmdiff_cache.backbones.base import Backbone, PromptEmbeddings
from mmdiff_cache.backbones.flow_matching import add_noise, draw_batch
from mmdiff_cache.backbones.info import PATCH
from mmdiff_cache.config import NoiseConfig
from mmdiff_cache.encoders.dinov3 import DINOv3
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.extraction import concept_attention, cross_attention
from mmdiff_cache.extraction.host_copy import start_copy
from mmdiff_cache.extraction.profile import Profile
from mmdiff_cache.extraction.taps import capturing
from mmdiff_cache.extraction.variants import PLAIN, as_variant
from mmdiff_cache.records import STATISTICS, FeatureBatch, PreparedSample
from mmdiff_cache.store.schema import Variant

FLOAT16_MAX = 65504.0
ENTROPY_BINS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    """One pass of the backbone over B samples, on its device."""

    latents: Float32[Tensor, "B h w P"]
    """Clean, before noising."""
    hidden_states: Float[Tensor, "B T L h w C"]
    """In the model's own dtype."""
    concept_scores: Mapping[str, Float32[Tensor, "B T block K h w"]]
    cross_attention: Float32[Tensor, "B T block h w"] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """One forward pass over B latents."""

    velocity: Float[Tensor, "B c H_f W_f"]
    hidden_states: Float[Tensor, "B L h w C"]
    """In the model's own dtype."""
    concept_scores: Mapping[str, Float32[Tensor, "B block K h w"]]
    cross_attention: Float32[Tensor, "B block h w"] | None


class Extractor:
    """Captures the outputs of `layers` at `timesteps`, and the concept scores of `vocabularies`.

    All timesteps of a batch go through the transformer together. Features are bit-identical for the same
    batch; across batch sizes they agree to rounding.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Sequence[str],
        timesteps: Sequence[float],
        vocabularies: Mapping[str, Sequence[str]],
        noise: NoiseConfig,
        guidance: float | None,
        variants: Sequence[Variant] = (PLAIN,),
        cross_attention: bool = False,
        encoders: Sequence[DINOv3] = (),
        profile: Profile | None = None,
    ) -> None:
        backbone.info.check_layers(layers)
        for layer in layers:
            if layer not in backbone.blocks:
                raise ConfigError(f"layer {layer} was left out when {backbone.info.name} was loaded")
        self.backbone = backbone
        self.layers = tuple(layers)
        self.timesteps = tuple(timesteps)
        self.vocabularies = {name: tuple(words) for name, words in vocabularies.items()}
        self.variants = tuple(variants)
        self.encoders = tuple(encoders)
        self.turn = threading.Lock()
        """Held by the partition that computes, where several are in one process: taps follow one pass."""
        self._cross_attention = cross_attention
        self.profile = profile or Profile(on=False)
        self._noise = noise
        self._guidance = guidance
        self._concepts = {name: backbone.embed_concepts(words) for name, words in self.vocabularies.items()}

    def __call__(self, samples: Sequence[PreparedSample]) -> FeatureBatch:
        """Features of samples of one size. Values that are not finite do not raise: see `failures`."""
        return self.begin(samples)()

    @torch.inference_mode()
    def begin(self, samples: Sequence[PreparedSample]) -> Callable[[], FeatureBatch]:
        """Start a batch; call what it returns, from any thread, to wait for its features.

        On a GPU their copy to the CPU then goes on beside the next batch.
        """
        arriving = [self._send(self.capture(samples, variant)) for variant in self.variants]
        encoded = self.discriminative(samples)
        return lambda: replace(_side_by_side([wait() for wait in arriving]), discriminative=encoded)

    def finish(self, captured: Captured) -> FeatureBatch:
        """What was captured as it is stored, its variant axis of size 1: cast, counted, with concept maps."""
        return self._send(captured)()

    def _send(self, captured: Captured) -> Callable[[], FeatureBatch]:
        """Cast and count, and start the copy to the CPU; call what it returns to wait for that."""
        mapped = [_block_index(block) for block in self.backbone.info.concept_blocks]
        with self.profile.timing("cast and audit", self.backbone.device):
            stored, audit = store_as_float16(captured.hidden_states)
            maps = {
                name: concept_attention.concept_maps(scores[:, :, mapped])
                for name, scores in captured.concept_scores.items()
            }
        tensors = {"hidden_states": stored[:, None], "latents": captured.latents, "audit": audit[:, None]}
        tensors |= {f"scores/{name}": scores[:, None] for name, scores in captured.concept_scores.items()}
        tensors |= {f"maps/{name}": values[:, None] for name, values in maps.items()}
        if captured.cross_attention is not None:
            tensors["cross_attention"] = captured.cross_attention[:, None]
        arrived = start_copy(tensors, self.backbone.device, self.profile)
        return lambda: _feature_batch(arrived(), self.vocabularies)

    def discriminative(self, samples: Sequence[PreparedSample]) -> dict[str, NDArray[np.float16]]:
        """Features [B V L h w D] of every encoder; a picture and its mirror image are each encoded once."""
        sides = {variant.flipped: variant for variant in self.variants}
        pictures = {
            flipped: torch.from_numpy(np.stack([as_variant(sample, variant).image for sample in samples]))
            for flipped, variant in sides.items()
        }
        found: dict[str, NDArray[np.float16]] = {}
        for encoder in self.encoders:
            with self.profile.timing("encoders", self.backbone.device):
                maps = {flipped: clamp_to_float16(encoder(images)) for flipped, images in pictures.items()}
            stacked = [maps[variant.flipped] for variant in self.variants]
            found[encoder.info.name] = torch.stack(stacked, dim=1).cpu().numpy()
        return found

    @torch.inference_mode()
    def capture(self, samples: Sequence[PreparedSample], variant: Variant = PLAIN) -> Captured:
        """What the blocks put out for one variant, before it is cast for the store."""
        samples = [as_variant(sample, variant) for sample in samples]
        images = torch.from_numpy(np.stack([sample.image for sample in samples]))
        names, prompts = [sample.sample_id for sample in samples], [sample.prompt for sample in samples]
        with self.profile.timing("VAE", self.backbone.device):
            clean = self.backbone.encode_image(images)
        return self.capture_latents(clean, names, prompts, variant.noise_draw)

    @torch.inference_mode()
    def capture_latents(
        self,
        clean: Float[Tensor, "B c H_f W_f"],
        sample_ids: Sequence[str],
        prompts: Sequence[str],
        draw: int = 0,
    ) -> Captured:
        """Noise clean latents to every timestep, and capture them all in one pass."""
        backbone, batch, steps = self.backbone, len(sample_ids), len(self.timesteps)
        latents = backbone.pack(clean)
        times = torch.tensor(self.timesteps, device=clean.device)
        noise = draw_batch(self._noise, sample_ids, steps, clean.shape[1:], draw)
        noised = add_noise(clean, noise.to(clean.device), times, self._noise.form).flatten(0, 1)
        with self.profile.timing("text", backbone.device):
            embedded = backbone.encode_prompts(prompts).repeat_each(steps)
        with self.profile.timing("transformer", backbone.device):
            seen = self.observe(noised, times.repeat(batch), embedded)
        return Captured(
            latents=latents,
            hidden_states=rearrange(seen.hidden_states, "(B T) L h w C -> B T L h w C", B=batch),
            concept_scores={
                name: rearrange(scores, "(B T) block K h w -> B T block K h w", B=batch)
                for name, scores in seen.concept_scores.items()
            },
            cross_attention=None
            if seen.cross_attention is None
            else rearrange(seen.cross_attention, "(B T) block h w -> B T block h w", B=batch),
        )

    def observe(
        self,
        noised: Float[Tensor, "B c H_f W_f"],
        t: Float[Tensor, " B"],
        prompts: PromptEmbeddings,
        guidance: float | None = None,
    ) -> Observed:
        """One forward pass: the output of every tapped block, and the scores of every double block.

        The velocity is the same bit for bit as without looking. `guidance` stands in for the extractor's own.
        """
        guidance = self._guidance if guidance is None else guidance
        blocks, text_tokens = self.backbone.blocks, prompts.tokens.shape[1]
        height, width = (side // PATCH for side in noised.shape[2:])
        with ExitStack() as stack:
            # First, so that it reads the prompt's keys before the concepts go through the same projections.
            attended = stack.enter_context(cross_attention.reading(blocks)) if self._cross_attention else {}
            streams: dict[str, concept_attention.ConceptStream] = {}
            if self._concepts:
                modulation = self.backbone.concept_modulation(t, guidance)
                reading = concept_attention.reading(blocks, self._concepts, modulation)
                streams = stack.enter_context(reading)
            taps = capturing(blocks, self.layers, text_tokens=text_tokens, image_tokens=height * width)
            outputs = stack.enter_context(taps)
            velocity = self.backbone.forward(noised, t, prompts, guidance)
        layers = [outputs[layer] for layer in self.layers]
        return Observed(
            velocity=velocity,
            hidden_states=rearrange(layers, "L B (h w) C -> B L h w C", h=height),
            concept_scores={
                name: rearrange(list(stream.scores.values()), "block B K (h w) -> B block K h w", h=height)
                for name, stream in streams.items()
            },
            cross_attention=rearrange(list(attended.values()), "block B (h w) -> B block h w", h=height)
            if attended
            else None,
        )


def _side_by_side(variants: Sequence[FeatureBatch]) -> FeatureBatch:
    """Batches of one variant each as one; the latents are the first variant's."""
    first = variants[0]
    if len(variants) == 1:
        return first
    attended = [one.cross_attention for one in variants if one.cross_attention is not None]
    return FeatureBatch(
        hidden_states=np.concatenate([one.hidden_states for one in variants], axis=1),
        concept_scores={
            name: np.concatenate([one.concept_scores[name] for one in variants], axis=1)
            for name in first.concept_scores
        },
        concept_maps={
            name: np.concatenate([one.concept_maps[name] for one in variants], axis=1)
            for name in first.concept_maps
        },
        latents=first.latents,
        audit=np.concatenate([one.audit for one in variants], axis=1),
        cross_attention=np.concatenate(attended, axis=1) if attended else None,
    )


def _feature_batch(arrays: Mapping[str, NDArray[Any]], vocabularies: Iterable[str]) -> FeatureBatch:
    names = tuple(vocabularies)
    return FeatureBatch(
        hidden_states=arrays["hidden_states"],
        concept_scores={name: arrays[f"scores/{name}"] for name in names},
        concept_maps={name: arrays[f"maps/{name}"] for name in names},
        latents=arrays["latents"],
        audit=arrays["audit"],
        cross_attention=arrays.get("cross_attention"),
    )


def store_as_float16(
    hidden_states: Float[Tensor, "B T L h w C"],
) -> tuple[Float16[Tensor, "B T L h w C"], Float32[Tensor, "B T L statistic"]]:
    """Values as they are stored, and the STATISTICS of each map before the cast.

    The clamp is done in float32: in bfloat16 the bound 65504 itself would round up to 65536, which float16
    takes for infinite.
    """
    values = hidden_states.to(torch.float32)
    stored = values.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)
    size, axes = values.abs(), (-3, -2, -1)
    finite = values.isfinite()
    statistics = {
        "mean": values.mean(dim=axes),
        "rms": values.square().mean(dim=axes).sqrt(),
        "max_abs": size.amax(dim=axes),
        "entropy": norm_entropy(values),
        "clipped": ((size > FLOAT16_MAX) & finite).sum(dim=axes),
        "flushed": ((stored == 0) & (values != 0)).sum(dim=axes),
        "non_finite": (~finite).sum(dim=axes),
    }
    return stored, torch.stack([statistics[name].to(torch.float32) for name in STATISTICS], dim=-1)


def clamp_to_float16(values: Float[Tensor, "..."]) -> Float16[Tensor, "..."]:
    """The same cast without the statistics; values that are not finite become NaN, so that they are found."""
    wide = values.to(torch.float32)
    return wide.clamp(-FLOAT16_MAX, FLOAT16_MAX).where(wide.isfinite(), torch.nan).to(torch.float16)


def norm_entropy(values: Float32[Tensor, "*maps h w C"]) -> Float32[Tensor, "*maps"]:
    """Entropy in nats of the histogram of a map's token norms, in 64 equal bins from 0 to their maximum.

    The last bin holds its upper edge. Zero for a map of zeros, NaN if a norm is not finite. Paper: Fig. 3b.
    """
    norms = values.flatten(-3, -2).norm(dim=-1)
    largest = norms.amax(dim=-1, keepdim=True)
    usable = largest.isfinite() & (largest > 0)
    place = torch.where(usable, norms / largest, 0.0) * ENTROPY_BINS
    bins = place.nan_to_num().to(torch.int64).clamp(max=ENTROPY_BINS - 1)
    counts = torch.zeros(*bins.shape[:-1], ENTROPY_BINS, device=values.device)
    shares = counts.scatter_add_(-1, bins, torch.ones_like(norms)) / norms.shape[-1]
    entropy = torch.special.entr(shares).sum(dim=-1)
    return torch.where(largest[..., 0].isfinite(), entropy, torch.nan)


def failures(features: FeatureBatch, layers: Sequence[str], timesteps: Sequence[float]) -> dict[int, str]:
    """Positions in the batch of samples with values that are not finite, each with the reason to record."""
    counts = features.audit[..., STATISTICS.index("non_finite")]
    found: dict[int, str] = {}
    for position, variant, timestep, layer in np.argwhere(counts > 0):
        number = int(counts[position, variant, timestep, layer])
        found.setdefault(
            int(position), f"{number} values of {layers[layer]} at t={timesteps[timestep]:g} are not finite"
        )
    for name, scores in features.concept_scores.items():
        for position in np.flatnonzero(~np.isfinite(scores).all(axis=tuple(range(1, scores.ndim)))):
            found.setdefault(int(position), f"concept scores of vocabulary {name!r} are not finite")
    for name, maps in features.discriminative.items():
        for position in np.flatnonzero(~np.isfinite(maps).all(axis=tuple(range(1, maps.ndim)))):
            found.setdefault(int(position), f"discriminative features of {name!r} are not finite")
    return found


def _block_index(address: str) -> int:
    return int(address.rpartition(".")[2])
