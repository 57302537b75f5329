"""A small model, joint and per-rank data, and a loop, for the tests with two processes."""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from mofasgd import MoFaSGD, param_groups

VOCABULARY, WIDTH, WORLD, MICRO = 64, 48, 2, 2


class Net(nn.Module):
    """Linear layers of even and odd sizes, one of them used by hand, a matrix of one row, an embedding, a vector of 1."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 73)
        self.down = nn.Linear(73, WIDTH, bias=False)
        self.raw = nn.Parameter(torch.randn(WIDTH, 31) / 7)
        self.row = nn.Linear(WIDTH, 1)
        self.stack = nn.Parameter(torch.randn(3, 31, WIDTH) / 7)
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, ids):
        x = self.norm(self.embedding(ids))
        x = x + self.down(F.gelu(self.up(x)))
        x = x + F.gelu(x @ self.raw) @ self.stack.sum(0) + self.shift
        return (x @ self.embedding.weight.mT) * (1 + self.row(x))


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype)


def optimizer(model, **options):
    """Embedding, matrices and the stack factored, rank 2; AdamW for vectors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rank is lowered.*")
        groups = param_groups(model, rank=2, lr=0.02, adamw_lr=3e-3, factor=("embedding.weight", "row.weight"))
        return MoFaSGD(groups, **options)


def batches(step):
    """Return MICRO joint micro-batches (WORLD * 2, 9); rank i takes rows 2 i and 2 i + 1."""
    data = torch.Generator().manual_seed(step)
    return [torch.randint(0, VOCABULARY, (2 * WORLD, 9), generator=data) for _ in range(MICRO)]


def loss_of(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


def train(model, opt, steps, rank=None, called=None, before=None):
    """Take `steps` steps of `opt`, by the rows of `rank` (None: all); return the gradient norms.

    `called` is what is called in place of the model (a wrapper); `before(step, micro)` runs before each backward.
    """
    called, norms = model if called is None else called, []
    for step in range(steps):
        for micro, tokens in enumerate(batches(step)):
            if before is not None:
                before(step, micro)
            own = tokens if rank is None else tokens[2 * rank : 2 * rank + 2]
            (loss_of(called, own) / MICRO).backward()
        opt.step()
        norms.append(opt.grad_norm().item())
        called.zero_grad()
    return norms


def alone(dtype, steps, mode=None, **options):
    """Return what one process makes of the joint batches: (weights, gradient norms)."""
    model = net(dtype)
    opt = optimizer(model, **options)
    if mode is not None:
        opt.attach(model, mode)
    norms = train(model, opt, steps)
    return copy.deepcopy(dict(model.state_dict())), norms


def distance(weights, others, start):
    """|weights - others| relative to |others - start|, the largest over the parameters that have moved."""
    far = {}
    for name, value in others.items():
        moved = (value.double() - start[name].double()).norm()
        if moved > 0:
            far[name] = ((weights[name].double() - value.double()).norm() / moved).item()
    return max(far.values()), max(far, key=far.get)
