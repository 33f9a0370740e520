"""How latents are noised, and on what the noise depends."""

import hashlib

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from mmdiff_cache.backbones.flow_matching import add_noise, draw_batch
from mmdiff_cache.config import NoiseConfig

SHAPE = (4, 8, 8)
TIMES = (0.78, 0.52, 0.26, 0.001)


def latents(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_flow_noising_is_that_of_the_diffusers_scheduler_bit_for_bit() -> None:
    clean, noise = latents(), draw_batch(NoiseConfig(), ["a", "b"], len(TIMES), SHAPE)
    noised = add_noise(clean, noise, torch.tensor(TIMES), "flow")
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=list(TIMES))
    for index in range(len(TIMES)):
        at = scheduler.timesteps[index].expand(2)
        assert torch.equal(noised[:, index], scheduler.scale_noise(clean, at, noise[:, 0]))


@pytest.mark.parametrize("form", ["flow", "vp"])
def test_time_zero_is_the_picture_and_time_one_the_noise(form: str) -> None:
    clean, noise = latents(), draw_batch(NoiseConfig(), ["a", "b"], 2, SHAPE)
    noised = add_noise(clean, noise, torch.tensor([0.0, 1.0]), form)
    assert torch.equal(noised[:, 0], clean)
    assert torch.equal(noised[:, 1], noise[:, 0])


@given(st.floats(0.0, 1.0, width=32))
def test_the_vp_form_keeps_the_variance_and_the_flow_form_the_mean_path(t: float) -> None:
    clean, noise = torch.ones(1, *SHAPE), torch.ones(1, 1, *SHAPE)
    vp = add_noise(clean, 0 * noise, torch.tensor([t]), "vp") ** 2
    vp = vp + add_noise(0 * clean, noise, torch.tensor([t]), "vp") ** 2
    torch.testing.assert_close(vp, torch.ones_like(vp))
    torch.testing.assert_close(add_noise(clean, noise, torch.tensor([t]), "flow"), torch.ones(1, 1, *SHAPE))


def test_noise_depends_on_the_seed_and_the_sample_alone() -> None:
    one = draw_batch(NoiseConfig(seed=7), ["b"], 4, SHAPE)
    several = draw_batch(NoiseConfig(seed=7), ["a", "b", "c"], 2, SHAPE)
    assert torch.equal(one[0], several[1])
    assert not torch.equal(several[0], several[1])
    assert not torch.equal(one, draw_batch(NoiseConfig(seed=8), ["b"], 4, SHAPE))


def test_noise_is_shared_over_timesteps_unless_asked_otherwise() -> None:
    shared = draw_batch(NoiseConfig(), ["a"], 4, SHAPE)
    apart = draw_batch(NoiseConfig(shared=False), ["a"], 4, SHAPE)
    assert shared.shape == (1, 1, *SHAPE)
    assert apart.shape == (1, 4, *SHAPE)
    assert torch.equal(shared[:, 0], apart[:, 0])
    assert len({step.numpy().tobytes() for step in apart[0]}) == 4


def test_noise_follows_its_written_rule() -> None:
    """Philox 4x64 under the first 16 bytes of a SHA-256, so that an outsider can draw it again."""
    digest = hashlib.sha256(b"mmdiff-cache noise 1\x005\x00house/1.jpg\x000").digest()
    key = np.frombuffer(digest[:16], dtype="<u8")
    expected = np.random.Generator(np.random.Philox(key=key)).standard_normal(SHAPE, dtype=np.float32)
    drawn = draw_batch(NoiseConfig(seed=5), ["house/1.jpg"], 1, SHAPE)
    np.testing.assert_array_equal(drawn[0, 0].numpy(), expected)
