"""What two processes do with sharded weights; run in both of them by dist_ranks.py."""

import functools

import torch
from dist_case import net, optimizer, train
from torch.distributed.fsdp import fully_shard

STEPS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def full(model):
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}


def state_of(opt):
    return [
        (v.full_tensor() if hasattr(v, "full_tensor") else v).clone()
        for p in opt.state
        for _, v in sorted(opt.state[p].items())
    ]


def sharded(model, **options):
    for part in (model.up, model.down):
        fully_shard(part, **options)
    return fully_shard(model, **options)


def trained(rank, dtype, mode, steps=STEPS, policy=None, **options):
    model = net(dtype)
    sharded(model, **({} if policy is None else {"mp_policy": policy}))
    opt = optimizer(model, **options)
    if mode != "dense":
        opt.attach(model, mode)
    norms = train(model, opt, steps, rank)
    return full(model), norms, state_of(opt), (opt.traffic.bytes, opt.traffic.calls)


CASES = {
    f"fsdp {mode} {name}": functools.partial(trained, dtype=dtype, mode=mode)
    for mode in ("dense", "auto", "release")
    for name, dtype in DTYPES.items()
}
