"""The transformer over timesteps: sequences of a few tokens, one for each position of the grid.

With T = 4 the usual attention kernels spend their time on bookkeeping: they are made for long sequences.
Here the axes are [T, M, D] with all M positions in the inner loops, so that every linear layer is one large
matrix product and attention is T x T products over contiguous memory.
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
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(dim=2)
        scores = (q[:, None] * k[None]).sum(dim=-1) * q.shape[-1] ** -0.5
        attention = functional.softmax(scores, dim=1)
        mixed = (attention[..., None] * v[None]).sum(dim=1)
        return self.out(mixed.flatten(-2))


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
        self.dropout = nn.Dropout(dropout)

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
