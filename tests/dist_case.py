"""A small model, joint and per-rank data, and a loop, for the tests with two processes."""

import warnings
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from documents import Loss, paragraphs
from torch import nn
from torch.utils.checkpoint import checkpoint

import mofasgd
from mofasgd import MoFaSGD, param_groups
from mofasgd.dist.shards import whole

VOCABULARY, WIDTH, WORLD = 64, 48, 2


class Net(nn.Module):
    """Linear layers of even and odd sizes, a matrix used by hand, one of one row, a stack, a tied embedding."""

    checkpointed = False

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

    def wide(self, x):
        return self.down(F.gelu(self.up(x)))

    def forward(self, ids, skip=False):
        x = self.norm(self.embedding(ids))
        if not skip:
            x = x + (checkpoint(self.wide, x, use_reentrant=False) if self.checkpointed else self.wide(x))
        x = x + F.gelu(x @ self.raw) @ self.stack.sum(0) + self.shift.to(x.dtype)
        return (x @ self.embedding.weight.mT) * (1 + self.row(x))


def net(dtype=torch.float32, seed=0):
    with torch.device("cpu"):
        torch.manual_seed(seed)
        model = Net()
    return model.to(torch.get_default_device(), dtype)


def optimizer(model, **options):
    """Embedding, matrices and the stack factored, rank 2; AdamW for vectors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rank is lowered.*")
        groups = param_groups(model, rank=2, lr=0.02, adamw_lr=3e-3, factor=("embedding.weight", "row.weight"))
        return MoFaSGD(groups, **options)


def batches(step, micro):
    """Return joint micro-batches (WORLD * 2, 9); rank i takes rows 2 i and 2 i + 1."""
    data, device = torch.Generator().manual_seed(step), torch.get_default_device()
    drawn = [torch.randint(0, VOCABULARY, (2 * WORLD, 9), generator=data, device="cpu") for _ in range(micro)]
    return [tokens.to(device) for tokens in drawn]


def loss_of(model, tokens, **options):
    return F.cross_entropy(model(tokens[:, :-1], **options).float().flatten(0, 1), tokens[:, 1:].flatten())


def train(model, opt, steps, rank=None, *, first=0, called=None, micro=2, loss=loss_of, before=nullcontext):
    """Take `steps` steps of `opt`, by the rows of `rank` (None: all); return the gradient norms.

    `called` is what is called in place of the model (a wrapper); `before(micro)` is the context of each micro-batch.
    """
    called, norms = model if called is None else called, []
    for step in range(first, first + steps):
        for number, tokens in enumerate(batches(step, micro)):
            own = tokens if rank is None else tokens[2 * rank : 2 * rank + 2]
            with before(number):
                (loss(called, own) / micro).backward()
        opt.step()
        norms.append(opt.grad_norm().item())
        called.zero_grad()
    return norms


def documented(rank, number, steps, **wrappers):
    """Run the lines number `number` of docs/distributed.md, then `steps` steps with what they have made."""
    model = net()
    model.layers = [model.up, model.down]
    names = {"mofasgd": mofasgd, "model": model, **wrappers}
    (tokens,) = batches(99, 1)
    own = tokens if rank is None else tokens[2 * rank : 2 * rank + 2]
    names["loss"] = Loss(names, lambda called: loss_of(called, own))
    exec(paragraphs("distributed.md")[number], names)
    return outcome(model, names["opt"], train(model, names["opt"], steps, rank, called=names["model"]))


def state_of(opt):
    """Return copies of all state, whole, in an order that is the same on all ranks."""
    return [
        whole(value).to("cpu", copy=True) for _, p, _ in opt._parameters() for _, value in sorted(opt.state[p].items())
    ]


def weights_of(model):
    return {name: whole(value).to("cpu", copy=True) for name, value in model.state_dict().items()}


def outcome(model, opt, norms):
    """Return what a case is compared by."""
    return Outcome(weights_of(model), norms, state_of(opt), opt.traffic.bytes)


class Outcome(NamedTuple):
    weights: dict
    norms: list
    state: list
    bytes: int

    def same(self, other):
        """Whether all bits are equal."""
        pairs = [*zip(self.state, other.state, strict=True)]
        pairs += [(value, other.weights[name]) for name, value in self.weights.items()]
        return self.norms == other.norms and all(torch.equal(a, b) for a, b in pairs)


def alone(dtype, steps, *, mode=None, step_in_backward=False, micro=2, loss=loss_of, **options):
    """Return what one process makes of the joint batches."""
    model = net(dtype)
    opt = optimizer(model, **options)
    if mode is not None:
        opt.attach(model, mode, step_in_backward=step_in_backward)
    return outcome(model, opt, train(model, opt, steps, micro=micro, loss=loss))


def distance(weights, others, start):
    """|weights - others| relative to |others - start|, the largest over the parameters that have moved."""
    far = {}
    for name, value in others.items():
        moved = (value.double() - start[name].double()).norm()
        if moved > 0:
            far[name] = ((weights[name].double() - value.double()).norm() / moved).item()
    return max(far.values()), max(far, key=far.get)
