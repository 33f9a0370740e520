"""What is done to features before anything learns from them: channels left out, the others standardised."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class InputLayer(nn.Module):
    """Leaves out the channels of `drop`; with `statistics` = (T, L) the others get mean 0 and deviation 1.

    A few channels of a diffusion transformer are hundreds of times as large as the rest ("massive
    activations"); DiTF drops two of FLUX.1-dev. Mean and deviation are buffers, so a checkpoint has them;
    before `set` they are 0 and 1. Without either, features pass as they are.
    """

    def __init__(self, *, channels: int, drop: tuple[int, ...], statistics: tuple[int, int] | None) -> None:
        super().__init__()
        kept = [channel for channel in range(channels) if channel not in drop]
        self.register_buffer("kept", torch.tensor(kept) if drop else None, persistent=False)
        shape = None if statistics is None else (*statistics, 1, 1, len(kept))
        self.register_buffer("mean", None if shape is None else torch.zeros(shape))
        self.register_buffer("deviation", None if shape is None else torch.ones(shape))
        self.kept: Tensor | None
        self.mean: Tensor | None
        self.deviation: Tensor | None

    def forward(self, features: Float[Tensor, "B T L h w C"]) -> Float[Tensor, "B T L h w kept"]:
        """Features as everything behind sees them; in float32 where they are standardised."""
        if self.kept is not None:
            features = features.index_select(-1, self.kept)
        if self.mean is None or self.deviation is None:
            return features
        return (features.float() - self.mean) / self.deviation

    @torch.no_grad()
    def set(self, mean: Float[Tensor, "T L C"], deviation: Float[Tensor, "T L C"]) -> None:
        """Take what was measured of all channels; one that never varies is only shifted."""
        assert self.mean is not None
        assert self.deviation is not None
        if self.kept is not None:
            mean, deviation = mean[..., self.kept], deviation[..., self.kept]
        self.mean.copy_(mean[:, :, None, None])
        self.deviation.copy_(deviation.where(deviation > 0, 1.0)[:, :, None, None])
