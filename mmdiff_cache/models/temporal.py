"""The transformer over timesteps: sequences of a few tokens, one for each position of the grid.

With T = 4 the usual attention kernels spend their time on bookkeeping: they are made for long sequences.
Here the axes are [T, M, D], so that every linear layer is one large matrix product over all M positions. For
attention alone the positions go last, which costs nothing (a matrix product may write its result transposed):
then the T x T products of all pairs run over contiguous memory.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

POSITION_STD = 0.02
"""Spread of the temporal position embedding at the start."""


class TemporalAttention(nn.Module):
    """Multi-head self-attention over the first axis."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "T M D"]) -> Float[Tensor, "T M D"]:
        """Each of the M positions attends over its own T timesteps."""
        timesteps, positions, width = x.shape
        # [3D, T*M]: W X' instead of X W', so that positions are the last and contiguous axis.
        projected = torch.addmm(self.qkv.bias[:, None], self.qkv.weight, x.flatten(0, 1).t())
        q, k, v = projected.view(3, self.heads, -1, timesteps, positions)
        scores = (q.unsqueeze(3) * k.unsqueeze(2)).sum(dim=1)  # [heads, T asking, T asked, M]
        attention = functional.softmax(scores * (width // self.heads) ** -0.5, dim=2)
        mixed = (attention.unsqueeze(1) * v.unsqueeze(2)).sum(dim=3)  # [heads, D / heads, T, M]
        return self.out(mixed.view(width, -1).t()).view(x.shape)


class Dropout(nn.Module):
    """Dropout with probability `rate`; on a CPU three times as fast as PyTorch's own.

    There the generator takes longer than all else, so one 64-bit number serves four values. The rate is met
    to 1 / 65536, and the values that stay are scaled by exactly the inverse of what was met.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "T M D"]) -> Float[Tensor, "T M D"]:
        """Values zeroed at random in training, untouched in evaluation."""
        if not self.training or self.rate == 0.0:
            return x
        if x.device.type != "cpu":
            return functional.dropout(x, self.rate)
        dropped_of_65536 = round(self.rate * 65536)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        lots = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = x.masked_fill(lots < dropped_of_65536 - 32768, 0.0)
        return kept * (65536 / (65536 - dropped_of_65536))


class Block(nn.Module):
    """Pre-norm attention and MLP; LayerScale holds both branches near zero at the start."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float, layer_scale: float) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = TemporalAttention(width, heads)
        self.attention_scale = nn.Parameter(torch.full((width,), layer_scale))
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.mlp_scale = nn.Parameter(torch.full((width,), layer_scale))
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "T M D"]) -> Float[Tensor, "T M D"]:
        """x + scale * attention(norm(x)), then the same with the MLP; dropout on each branch."""
        x = torch.addcmul(x, self.dropout(self.attention(self.attention_norm(x))), self.attention_scale)
        return torch.addcmul(x, self.dropout(self.mlp(self.mlp_norm(x))), self.mlp_scale)


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
