"""The transformer over timesteps: sequences of a few tokens, one for each position of the grid.

With T = 4 the usual attention kernels spend their time on bookkeeping: they are made for long sequences. And
memory traffic costs more than arithmetic here. So the axes are [T, M, D], which makes every linear layer one
large matrix product over all M positions; on a CPU attention alone has the positions last, where all pairs of
timesteps are sums over contiguous memory; LayerScale is multiplied into the weights before it, not into
activations; and dropout's scale and the residual addition are one pass. Blocks can be compiled, one by one.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

MOST_SEQUENCES = 65535
"""Sequences that a fused attention kernel takes at once: CUDA's limit on one side of a grid of blocks."""
POSITION_STD = 0.02
"""Spread of the temporal position embedding at the start."""


class PairwiseAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(d)) v over T timesteps at M positions each; the softmax in float32.

    Sums over pairs of timesteps are accumulated in place, so no product over all pairs and channels is ever
    held: the largest temporary is [heads T T M]. Axes: heads, d channels of a head, T, M.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Float[Tensor, "3 heads d T M"]) -> Float[Tensor, "heads d T M"]:
        """What each timestep gathers from all."""
        exact = torch.promote_types(qkv.dtype, torch.float32)
        q, k, v = (x.to(exact) for x in qkv)
        attention = functional.softmax(_dot(q, k).mul_(q.shape[1] ** -0.5), dim=2)
        ctx.save_for_backward(qkv, attention)
        return _mix(attention, v, torch.empty_like(qkv[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "heads d T M"]) -> Float[Tensor, "3 heads d T M"]:  # pyright: ignore
        """Gradients of q, k and v."""
        qkv, attention = cast(tuple[Tensor, ...], ctx.saved_tensors)
        q, k, v = (x.to(attention.dtype) for x in qkv)
        grad = grad.to(attention.dtype)
        towards = _dot(grad, v)
        towards.sub_((towards * attention).sum(dim=2, keepdim=True)).mul_(attention)
        towards.mul_(q.shape[1] ** -0.5)
        out = torch.empty_like(qkv)
        _mix(towards, k, out[0])
        _mix(towards.transpose(1, 2), q, out[1])
        _mix(attention.transpose(1, 2), grad, out[2])
        return out


def _dot(x: Float[Tensor, "heads d T M"], y: Float[Tensor, "heads d T M"]) -> Float[Tensor, "heads T T M"]:
    """Inner products of each timestep of x with each of y, head by head."""
    total = x[:, 0, :, None] * y[:, 0, None]
    for channel in range(1, x.shape[1]):
        total.addcmul_(x[:, channel, :, None], y[:, channel, None])
    return total


def _mix(
    shares: Float[Tensor, "heads T T M"],
    values: Float[Tensor, "heads d T M"],
    out: Float[Tensor, "heads d T M"],
) -> Float[Tensor, "heads d T M"]:
    """Into `out`: for each timestep, the sum over the others of share times value, added up in float32."""
    total = out if out.dtype == shares.dtype else torch.empty_like(values)
    torch.mul(shares[:, None, :, 0], values[:, :, :1], out=total)
    for other in range(1, values.shape[2]):
        total.addcmul_(shares[:, None, :, other], values[:, :, other, None])
    return out if total is out else out.copy_(total)


class TemporalAttention(nn.Module):
    """Multi-head self-attention over the first axis."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "T M D"], scale: Float[Tensor, " D"]) -> Float[Tensor, "T M D"]:
        """`scale` times what each of the M positions gathers over its own T timesteps."""
        if len(x) == 1:
            mixed = self._of_itself(x)
        elif x.device.type == "cpu":
            mixed = self._pairwise(x)
        else:
            mixed = self._in_one_kernel(x)
        return _scaled(self.out, mixed, scale).view(x.shape)

    def _of_itself(self, x: Float[Tensor, "1 M D"]) -> Float[Tensor, "M D"]:
        """A single timestep attends to itself alone: its value, whatever query and key are."""
        *_, weight = self.qkv.weight.chunk(3)
        *_, bias = self.qkv.bias.chunk(3)
        return functional.linear(x[0], weight, bias)

    def _pairwise(self, x: Float[Tensor, "T M D"]) -> Float[Tensor, "N D"]:
        """By sums over pairs of timesteps, made for a processor's caches."""
        timesteps, positions, width = x.shape
        # [3D, T*M]: W X' instead of X W', so that positions are the last and contiguous axis.
        projected = torch.addmm(self.qkv.bias[:, None], self.qkv.weight, x.flatten(0, 1).t())
        mixed = cast(Tensor, PairwiseAttention.apply(projected.view(3, self.heads, -1, timesteps, positions)))
        return mixed.view(width, -1).t()

    def _in_one_kernel(self, x: Float[Tensor, "T M D"]) -> Float[Tensor, "N D"]:
        """By PyTorch's fused attention; elsewhere sums over pairs would be hundreds of small launches."""
        timesteps, positions, width = x.shape
        heads = self.qkv(x).view(timesteps, positions, 3, self.heads, width // self.heads)
        parts = heads.permute(2, 1, 3, 0, 4).split(MOST_SEQUENCES, dim=1)
        mixed = [functional.scaled_dot_product_attention(*part).permute(2, 0, 1, 3) for part in parts]
        return torch.cat(mixed, dim=1).view(timesteps * positions, width)


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
    of_65536 = min(round(rate * 65536), 65535)  # a rate next to 1 keeps some all the same
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
