"""Noising a clean latent to the time at which the transformer is asked.

FLUX is trained on straight paths from data to noise, so its input at time t holds (1 - t) of the picture and
t of the noise, and the transformer is told t (it multiplies by 1000 itself). The time shift of a sampler only
chooses which times a run visits; it does not enter here.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff_cache.config import NoiseConfig, NoiseForm
from mmdiff_cache.records import draw_noise

OWN_DRAWS = 1 << 16
"""Where timesteps share no noise, draw number d of a sample's timestep j is number 65536 d + j."""


def draw_batch(
    noise: NoiseConfig, sample_ids: Sequence[str], timesteps: int, shape: Sequence[int], draw: int = 0
) -> Float[Tensor, "B T c H_f W_f"]:
    """Float32 noise on the CPU for a batch of latents of `shape` [c H/f W/f].

    The timestep axis has size 1 where all timesteps share one draw.
    A sample's noise depends on the seed, its id and the draw alone, never on the batch it is in.
    """
    draws = [draw] if noise.shared else [OWN_DRAWS * draw + j for j in range(timesteps)]
    drawn = [[draw_noise(noise.seed, sample, n, tuple(shape)) for n in draws] for sample in sample_ids]
    return torch.from_numpy(np.array(drawn))


def add_noise(
    clean: Float[Tensor, "B c H_f W_f"],
    noise: Float[Tensor, "B #T c H_f W_f"],
    timesteps: Float[Tensor, " T"],
    form: NoiseForm,
) -> Float[Tensor, "B T c H_f W_f"]:
    """The latent at each t in [0, 1], 1 = pure noise; all in float32.

    `flow`: (1 - t) x_0 + t eps, what the model was trained on. `vp`: sqrt(1 - t) x_0 + sqrt(t) eps, the
    paper's Eq. 1 read literally with alpha_t = 1 - t; the model is told the same t, though it never saw such
    inputs.
    """
    t = timesteps.to(torch.float32)[None, :, None, None, None]
    if form == "vp":
        return (1 - t).sqrt() * clean[:, None] + t.sqrt() * noise
    return (1 - t) * clean[:, None] + t * noise
