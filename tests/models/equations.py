"""Equations of the papers as slow references: vectors and loops, with nothing of ours but the weights."""

import math

import torch
from torch import Tensor, nn

from mmdiff_cache.models.aggregator import TimestepProjection
from mmdiff_cache.models.cbam import CBAM, ChannelGate


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """(x - mean) / standard deviation, scaled and shifted."""
    assert isinstance(norm, nn.LayerNorm)
    centred = x - x.mean()
    return centred / (centred.pow(2).mean() + norm.eps).sqrt() * norm.weight + norm.bias


def dense(x: Tensor, layer: nn.Linear) -> Tensor:
    return layer.weight @ x + layer.bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def softmax(scores: Tensor) -> Tensor:
    return scores.exp() / scores.exp().sum()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def project(x: Tensor, projection: nn.Module, norm: str) -> Tensor:
    """One token of one timestep: LayerNorm and 1 x 1 convolution, in the order that `norm` says."""
    assert isinstance(projection, TimestepProjection)
    if norm == "before_projection":
        x = layer_norm(x, projection.before)
    x = dense(x, projection.linear)
    return layer_norm(x, projection.after) if norm == "after_projection" else x


def channel_gate(x: Tensor, module: ChannelGate) -> Tensor:
    """M_c(F) of one sample [D h w]: sigmoid(MLP(avg) + MLP(max)) -> [D]."""
    first, last = module.shared[0], module.shared[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)

    def mlp(vector: Tensor) -> Tensor:
        return last.weight @ (first.weight @ vector + first.bias).clamp(min=0) + last.bias

    mean = torch.stack([channel.sum() / channel.numel() for channel in x])
    highest = torch.stack([channel.max() for channel in x])
    return sigmoid(mlp(mean) + mlp(highest))


def spatial_gate(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """M_s(F) of one sample [D h w]: sigmoid of a 7 x 7 window over (mean, max) of the channels -> [h w]."""
    assert conv.bias is not None
    pooled, reach = torch.stack((x.mean(0), x.max(0).values)), 3
    rows, columns = x.shape[1:]
    gate = torch.zeros(rows, columns)
    for i in range(rows):
        for j in range(columns):
            total = conv.bias[0].clone()
            for di in range(-reach, reach + 1):
                for dj in range(-reach, reach + 1):
                    if 0 <= i + di < rows and 0 <= j + dj < columns:
                        total += (conv.weight[0, :, di + reach, dj + reach] * pooled[:, i + di, j + dj]).sum()
            gate[i, j] = total
    return sigmoid(gate)


def cbam(features: Tensor, module: CBAM) -> Tensor:
    """F'' = M_s(F') F' with F' = M_c(F) F, sample by sample. Woo et al., 2018, Eq. 1 to 3."""
    refined = torch.zeros_like(features)
    for b, sample in enumerate(features):
        gated = sample * channel_gate(sample, module.channel)[:, None, None]
        refined[b] = gated * spatial_gate(gated, module.spatial.conv)
    return refined
