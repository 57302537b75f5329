"""A compact GPT: rotary positions, normalized queries and keys, squared ReLU, untied zero head.

The architecture of the modded-nanogpt speed runs without their later additions; every block and the head start at zero,
so the first gradients reach the head alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(x: Tensor) -> Tensor:
    """Return x / rms(x) over the last dimension, without a learned scale."""
    return F.rms_norm(x, x.shape[-1:])


def rotation(context: int, channels: int) -> Tensor:
    """Return cos and sin (2, context, channels / 2) of rotary positions, base 10000 (RoFormer, arXiv 2104.09864)."""
    frequencies = 10000.0 ** (-torch.arange(0, channels, 2) / channels)
    angles = torch.arange(context)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs of x (..., time, channels) by their positions' angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions on normalized queries and keys (QK-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mix x (batch, time, width) over time."""
        batch, time, width = x.shape
        q, k, v = (f(x).view(batch, time, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        q, k = rotate(norm(q), cos, sin).to(v.dtype), rotate(norm(k), cos, sin).to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return out


class Block(nn.Module):
    """Attention, then a squared-ReLU MLP of four times the width; both pre-norm and residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        for last in (self.attention.out, self.down):
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the residual stream (batch, time, width) after this block."""
        x = x + self.attention(norm(x), cos, sin)
        out: Tensor = x + self.down(F.relu(self.up(norm(x))).square())
        return out


class GPT(nn.Module):
    """Next-token logits (batch, time, vocab_size) of tokens (batch, time <= context)."""

    rotation: Tensor

    def __init__(self, vocab_size: int, context: int, *, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)
        self.register_buffer("rotation", rotation(context, width // heads), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits; `tokens` are int64."""
        cos, sin = self.rotation[:, : tokens.shape[1]]
        x = norm(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(norm(x))
        return logits


def token_loss(model: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy in nats and the number of predicted tokens, 0-dim.

    Args:
        model: tokens to logits, for instance a compiled `GPT`.
        windows: (batch, time + 1) int64; each token is predicted from those before it in its row. -1 at the end of a
            row is padding: it is not predicted and not counted.
    """
    targets = windows[:, 1:].flatten()
    logits = model(windows[:, :-1].clamp(min=0)).flatten(0, 1).float()
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum"), (targets != -1).sum()
