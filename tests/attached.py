"""A small GPT, a training loop over micro-batches, and distances, for the tests of attach."""

import copy
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from mofasgd import MoFaSGD, param_groups

VOCABULARY = 96


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.out.weight)  # its siblings get no gradient in the first step

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.relu(self.up(self.between(x)), inplace=True))


class GPT(nn.Module):
    def __init__(self, layers=2, width=64, heads=4):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt_loss(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def hf_loss(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def train(model, mode, *, loss=gpt_loss, steps=20, micro=4, seed=0, autocast=False, factor=(), rank=4, **options):
    """Return a trained copy of `model` and its optimizer; the data are a function of `seed` alone."""
    model = copy.deepcopy(model)
    opt = MoFaSGD(param_groups(model, rank=rank, lr=0.02, factor=factor), **options)
    if mode is not None:
        opt.attach(model, mode)
    data = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for _ in range(micro):
            tokens = torch.randint(0, VOCABULARY, (2, 17), generator=data)
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                value = loss(model, tokens)
            (value / micro).backward()
        opt.step()
        model.zero_grad()
    return model, opt


def distance(model, other, start):
    """|model - other| relative to |other - start|, over all parameters."""
    total = lambda a, b: sum((p - q).double().square().sum() for p, q in zip(a, b, strict=True)).sqrt()  # noqa: E731
    a, b, c = (list(m.parameters()) for m in (model, other, start))
    return (total(a, b) / total(b, c)).item()


def windows(handle):
    """Return the sketching windows of `handle` by the names of their parameters."""
    return {window.name: window for window in handle._windows.values()}
