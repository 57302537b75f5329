"""What two replicas do; run in both of them by dist_ranks.py."""

import copy
import functools
import gc
from contextlib import contextmanager, nullcontext

import torch
from dist_case import WIDTH, documented, loss_of, net, optimizer, outcome, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from mofasgd import MoFaSGD, param_groups

STEPS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def trained(
    rank,
    mode="auto",
    dtype=torch.float32,
    *,
    wrap=False,
    steps=STEPS,
    no_sync=False,
    step_in_backward=False,
    micro=2,
    loss=loss_of,
    **options,
):
    """Train one of two replicas; they begin with different weights where ours or DDP's broadcast is to help."""
    model = net(dtype, seed=rank)
    opt = optimizer(model, **options)
    if mode != "dense":
        opt.attach(model, mode, step_in_backward=step_in_backward)
    called = DDP(model) if wrap else model
    before = (
        (lambda number: called.no_sync() if number == 0 else nullcontext()) if no_sync else (lambda _: nullcontext())
    )
    norms = train(
        model, opt, steps, rank, called=called, micro=micro, loss=functools.partial(loss, rank=rank), before=before
    )
    return outcome(model, opt, norms)


def plain_loss(model, tokens, rank=None):
    return loss_of(model, tokens)


def unequal_loss(model, tokens, rank=None):
    """Rank 1, the second half of the joint batch, does not use two of the layers."""
    if rank is not None:
        return loss_of(model, tokens, skip=rank == 1)
    first, second = tokens.chunk(2)
    return (loss_of(model, first) + loss_of(model, second, skip=True)) / 2


def unused_loss(model, tokens, rank=None):
    """No rank uses two of the layers."""
    return loss_of(model, tokens, skip=True)


def bad_loss(model, tokens, rank=None):
    """The first half's gradient of `raw` is infinite."""
    value = loss_of(model, tokens)
    return value + (torch.inf * model.raw.sum() if rank in (None, 0) else 0.0)


def bytes_of_late_steps(rank):
    """Return bytes of one step after the first window, and the formula's."""
    model = net()
    opt = optimizer(model)
    opt.attach(model)
    train(model, opt, 2, rank)
    before = opt.traffic.bytes
    train(model, opt, 1, rank)
    factored = {p: opt.factors(p) for _, p, g in opt._parameters() if g["algorithm"] == "mofasgd"}
    formula = sum(4 * (U.numel() + V.numel() + s.numel() * s.shape[-1]) for U, s, V in factored.values())
    adamw = sum(4 * p.numel() for p in model.parameters() if p not in factored)
    return opt.traffic.bytes - before, formula, adamw


def drifted(rank, wrap=False):
    """Rank 1's momentum and weights are changed by hand; every second step compares."""
    model = net()
    opt = optimizer(model)
    opt.attach(model, check_every=2)
    called = DDP(model) if wrap else model
    train(model, opt, 2, rank, called=called)
    if rank == 1:
        if not wrap:
            opt.state[model.raw]["V"].add_(1e-3)
        with torch.no_grad():
            (model.norm if wrap else model.up).weight.add_(1e-3)
    train(model, opt, 2, rank, called=called)
    found = outcome(model, opt, [])
    train(model, opt, 2, rank, called=called)
    return found, outcome(model, opt, [])


def added_later(rank):
    """Each rank draws weights of its own for parameters that join after two steps."""
    model = net()
    opt = optimizer(model)
    opt.attach(model)
    norms = train(model, opt, 2, rank)
    torch.manual_seed(rank)
    model.more = nn.Linear(WIDTH, WIDTH)
    model.norm.register_forward_hook(lambda norm, args, x: x + model.more(x))
    opt.add_param_group({"params": [model.more.weight], "rank": 2})
    opt.add_param_group({"params": [model.more.bias], "algorithm": "adamw", "lr": 1e-3})
    return outcome(model, opt, norms + train(model, opt, 2, rank, first=2))


def unfrozen_without_a_batch(rank):
    """Of two steps after a parameter is unfrozen the first has no batch for rank 1."""
    model = net()
    opt = optimizer(model)
    model.up.weight.requires_grad_(False)
    opt.attach(model)
    norms = train(model, opt, 2, rank)
    model.up.weight.requires_grad_(True)
    norms += train(model, opt, 1, rank, first=2, micro=1 - rank)
    return outcome(model, opt, norms + train(model, opt, 1, rank, first=3))


def watched_later(rank):
    """Within a window rank 0 alone hooks a gradient, as reporters do."""
    model, seen = net(), []
    opt = optimizer(model)
    opt.attach(model)
    hooks = iter([False, rank == 0])

    @contextmanager
    def before(number):
        if number == 1 and next(hooks, False):
            model.up.weight.register_hook(lambda G: seen.append(tuple(G.shape)))
        yield

    return outcome(model, opt, train(model, opt, STEPS, rank, before=before)), seen


def resumed_otherwise(rank):
    """Rank 1 has not loaded what rank 0 has: one matrix has a momentum there only."""
    model = net()
    opt = optimizer(model)
    if rank == 0:
        opt.materialize()
        opt.state[model.raw]["U"].copy_(torch.eye(*opt.state[model.raw]["U"].shape))
        opt.state[model.raw]["V"].copy_(torch.eye(*opt.state[model.raw]["V"].shape))
        opt.state[model.raw]["s"].fill_(1.0)
        opt.state[model.raw]["initialized"].fill_(True)
        opt._pending = None
    opt.attach(model)
    return outcome(model, opt, train(model, opt, 1, rank))


def message(function, *args, **kwargs):
    """Return what `function` refuses."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "not refused"


def orders(rank):
    """Return what wrong orders of attach, wrap and detach are refused with, and what is left after a right one."""
    tokens = torch.zeros(2, 9, dtype=torch.long)
    model = net()
    opt, ddp = optimizer(model), DDP(model)
    found = {"attach(ddp)": message(opt.attach, ddp), "attach(ddp.module)": message(opt.attach, model)}
    part = MoFaSGD(param_groups(model.up, rank=2))
    found["attach(part of ddp.module)"] = message(part.attach, model.up)
    del ddp
    gc.collect()
    part.attach(model.up)
    ddp = DDP(model, find_unused_parameters=True)
    found["DDP(around attached)"] = message(ddp, tokens[:, :-1])
    del ddp
    gc.collect()
    part.handle.detach()
    handle = opt.attach(model)
    ddp = DDP(model)
    found["detach"] = message(handle.detach)
    found["copy"] = hasattr(copy.deepcopy(model), "_ddp_params_and_buffers_to_ignore")
    loss_of(ddp, tokens).backward()
    opt.step()
    found["detach later"] = message(handle.detach)
    del ddp
    gc.collect()
    handle.detach()
    traces = hasattr(model, "_ddp_params_and_buffers_to_ignore") or any(
        hasattr(p, "_ddp_ignored") for p in model.parameters()
    )
    found["left"] = traces
    return found


def a_root_s_own_parameter(rank):
    """DDP names it ".weight" in one place. What the user has DDP ignore stays ignored."""
    torch.manual_seed(rank)
    root = nn.Linear(40, 30)
    root.register_buffer("own", torch.full((2,), float(rank)))
    DDP._set_params_and_buffers_to_ignore_for_model(root, ["own"])
    opt = MoFaSGD(param_groups(root, rank=2))
    handle = opt.attach(root)
    ddp = DDP(root)
    for _ in range(3):
        ddp(torch.randn(5, 40)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    own = root.own.clone()
    del root.own
    found = outcome(root, opt, [])
    del ddp
    gc.collect()
    handle.detach()
    return found, own, root._ddp_params_and_buffers_to_ignore


def all_attached(rank):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.Tanh(), nn.Linear(30, 10, bias=False))
    opt = MoFaSGD(param_groups(model, rank=2, head="2", factor=("2.weight",)))
    opt.attach(model)
    for _ in range(3):
        model(torch.randn(5, 20)).square().mean().backward()
        opt.step()
    return outcome(model, opt, [])


CASES = {
    f"{'ddp' if wrap else 'plain'} {mode} {name}": functools.partial(
        trained, mode=mode, dtype=dtype, wrap=wrap, loss=plain_loss, no_sync=wrap
    )
    for wrap, modes in ((True, ("dense", "auto", "release")), (False, ("auto", "release")))
    for mode in modes
    for name, dtype in DTYPES.items()
} | {
    "clipped": functools.partial(trained, loss=plain_loss, max_grad_norm=0.1, weight_decay=0.1),
    "clipped under ddp": functools.partial(trained, loss=plain_loss, max_grad_norm=0.1, weight_decay=0.1, wrap=True),
    "stepped in backward": functools.partial(trained, mode="release", step_in_backward=True, micro=1, loss=plain_loss),
    "stepped in backward under ddp": functools.partial(
        trained, mode="release", step_in_backward=True, micro=1, loss=plain_loss, wrap=True
    ),
    "complement": functools.partial(
        trained, mode="release", step_in_backward=True, micro=1, loss=plain_loss, complement=1.0
    ),
    "unequal": functools.partial(trained, loss=unequal_loss),
    "unused": functools.partial(trained, loss=unused_loss, weight_decay=0.1),
    "not finite": functools.partial(trained, loss=bad_loss, steps=2),
    "long": functools.partial(trained, dtype=torch.bfloat16, steps=50, micro=1, loss=plain_loss, wrap=True),
    "bytes": bytes_of_late_steps,
    "drifted": drifted,
    "drifted under ddp": functools.partial(drifted, wrap=True),
    "added later": added_later,
    "watched later": watched_later,
    "resumed otherwise": resumed_otherwise,
    "orders": orders,
    "a root's own parameter": a_root_s_own_parameter,
    "all attached": all_attached,
    "documented": functools.partial(documented, number=0, steps=2, DistributedDataParallel=DDP),
    "unfrozen without a batch": unfrozen_without_a_batch,
}
