"""What two replicas do; run in both of them by dist_ranks.py."""

import functools

import torch
from dist_case import net, optimizer, train
from torch.nn.parallel import DistributedDataParallel as DDP

STEPS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("dense", "sketch", "release", "auto")


def state_of(opt):
    return [value.clone() for p in opt.state for _, value in sorted(opt.state[p].items())]


def trained(rank, dtype, mode, wrap, steps=STEPS, **options):
    model = net(dtype, seed=rank if mode != "dense" or wrap else 0)
    opt = optimizer(model, **options)
    if mode != "dense":
        opt.attach(model, mode)
    called = DDP(model) if wrap else model
    norms = train(model, opt, steps, rank, called)
    return dict(model.state_dict()), norms, state_of(opt), (opt.traffic.bytes, opt.traffic.calls)


CASES = {
    f"{'ddp' if wrap else 'plain'} {mode} {name}": functools.partial(trained, dtype=dtype, mode=mode, wrap=wrap)
    for wrap, modes in ((True, ("dense", "auto", "release")), (False, ("auto", "release")))
    for mode in modes
    for name, dtype in DTYPES.items()
}
