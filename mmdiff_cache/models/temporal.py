"""The transformer over timesteps: sequences of a few tokens, one for each position of the grid.

With T = 4 the usual attention kernels spend their time on bookkeeping: they are made for long sequences. And
memory traffic costs more than arithmetic here. So the axes are [T, M, D], which makes every linear layer one
large matrix product over all M positions; attention alone has the positions last, where all pairs of
timesteps are sums over contiguous memory; LayerScale is multiplied into the weights before it, not into
activations; and dropout's scale and the residual addition are one pass.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

POSITION_STD = 0.02
"""Spread of the temporal position embedding at the start."""


class PairwiseAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(d)) v over T timesteps at M positions each; the softmax in float32.

    Sums over pairs of timesteps are accumulated in place, so no product over all pairs and channels is ever
    held: the largest temporary is [heads T T M]. Axes: heads, d channels of a head, T, M.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "heads d T M"],
        k: Float[Tensor, "heads d T M"],
        v: Float[Tensor, "heads d T M"],
    ) -> Float[Tensor, "heads d T M"]:
        """What each timestep gathers from all."""
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = _dot(q.to(exact), k.to(exact)).mul_(q.shape[1] ** -0.5)
        attention = functional.softmax(scores, dim=2)
        ctx.save_for_backward(q, k, v, attention)
        return _mix(attention, v.to(exact)).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "heads d T M"]) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        """Gradients of q, k and v."""
        q, k, v, attention = cast(tuple[Tensor, ...], ctx.saved_tensors)
        exact = attention.dtype
        grad = grad.to(exact)
        towards = _dot(grad, v.to(exact))
        towards.sub_((towards * attention).sum(dim=2, keepdim=True)).mul_(attention)
        towards.mul_(q.shape[1] ** -0.5)
        back = towards.transpose(1, 2)
        return (
            _mix(towards, k.to(exact)).to(q.dtype),
            _mix(back, q.to(exact)).to(k.dtype),
            _mix(attention.transpose(1, 2), grad).to(v.dtype),
        )


def _dot(x: Float[Tensor, "heads d T M"], y: Float[Tensor, "heads d T M"]) -> Float[Tensor, "heads T T M"]:
    """Inner products of each timestep of x with each of y, head by head."""
    total = x[:, 0, :, None] * y[:, 0, None]
    for channel in range(1, x.shape[1]):
        total.addcmul_(x[:, channel, :, None], y[:, channel, None])
    return total


def _mix(
    shares: Float[Tensor, "heads T T M"], values: Float[Tensor, "heads d T M"]
) -> Float[Tensor, "heads d T M"]:
    """For each timestep, the sum over the others of share times value."""
    total = shares[:, None, :, 0] * values[:, :, :1]
    for other in range(1, values.shape[2]):
        total.addcmul_(shares[:, None, :, other], values[:, :, other, None])
    return total


class TemporalAttention(nn.Module):
    """Multi-head self-attention over the first axis."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "T M D"], scale: Float[Tensor, " D"]) -> Float[Tensor, "T M D"]:
        """`scale` times what each of the M positions gathers over its own T timesteps."""
        timesteps, positions, width = x.shape
        # [3D, T*M]: W X' instead of X W', so that positions are the last and contiguous axis.
        projected = torch.addmm(self.qkv.bias[:, None], self.qkv.weight, x.flatten(0, 1).t())
        q, k, v = projected.view(3, self.heads, -1, timesteps, positions)
        mixed = cast(Tensor, PairwiseAttention.apply(q, k, v))
        return _scaled(self.out, mixed.view(width, -1).t(), scale).view(x.shape)


def _scaled(linear: nn.Linear, x: Float[Tensor, "N E"], scale: Float[Tensor, " D"]) -> Float[Tensor, "N D"]:
    """scale * linear(x), with the scale multiplied into the weights."""
    return functional.linear(x, linear.weight * scale[:, None], linear.bias * scale)


class Block(nn.Module):
    """Pre-norm attention and MLP; LayerScale holds both branches near zero at the start."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float, layer_scale: float) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = TemporalAttention(width, heads)
        self.attention_scale = nn.Parameter(torch.full((width,), layer_scale))
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)
        self.mlp_scale = nn.Parameter(torch.full((width,), layer_scale))
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "T M D"]) -> Float[Tensor, "T M D"]:
        """x + scale * attention(norm(x)), then the same with the MLP; dropout on each branch."""
        rate = self.dropout if self.training else 0.0
        x = add_dropped(x, self.attention(self.attention_norm(x), self.attention_scale), rate)
        hidden = functional.gelu(self.mlp_in(self.mlp_norm(x)).flatten(0, 1))
        return add_dropped(x, _scaled(self.mlp_out, hidden, self.mlp_scale).view(x.shape), rate)


def add_dropped(
    x: Float[Tensor, "*shape"], branch: Float[Tensor, "*shape"], rate: float
) -> Float[Tensor, "*shape"]:
    """x + dropout(branch); on a CPU nearly three times as fast as PyTorch's own.

    There the generator takes longer than all else, so one 64-bit number serves four values. The rate is met
    to 1 / 65536, and the values that stay are scaled by exactly the inverse of what was met.
    """
    if rate == 0.0 or x.device.type != "cpu":
        return x + functional.dropout(branch, rate)
    of_65536 = round(rate * 65536)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    lots = words.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.ge(lots, of_65536 - 32768, out=torch.empty(x.shape, dtype=x.dtype))
    return torch.addcmul(x, branch, kept, value=65536 / (65536 - of_65536))


class TemporalTransformer(nn.Module):
    """Temporal position embedding and `depth` pre-norm blocks; no norm at the end.

    LayerScale makes the blocks nearly the identity at the start, as App. F asks: output = input + positions.
    """

    def __init__(
        self,
        *,
        timesteps: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        layer_scale: float,
    ) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(timesteps, 1, width) * POSITION_STD)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, dropout, layer_scale) for _ in range(depth)
        )

    def forward(self, x: Float[Tensor, "T M D"]) -> Float[Tensor, "T M D"]:
        """The sequence after all blocks."""
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return x
