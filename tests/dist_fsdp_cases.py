"""What two processes do with sharded weights; run in both of them by dist_ranks.py."""

import functools
from contextlib import contextmanager

import torch
from attached import windows
from dist_case import documented, net, optimizer, outcome, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mofasgd import MoFaSGD
from mofasgd.attach.window import Window
from mofasgd.dist.shards import whole
from mofasgd.paper import AuthorsMFSGD

STEPS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("dense", "auto", "release")
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded(model, **options):
    options.setdefault("mesh", mesh_of(2))
    for part in (model.up, model.down):
        fully_shard(part, **options)
    return fully_shard(model, **options)


def mesh_of(*shape, names=None):
    return init_device_mesh(torch.get_default_device().type, shape, mesh_dim_names=names)


@contextmanager
def added():
    """Yield the names of the parameters whose dense gradients windows see."""
    names, add = set(), Window.add

    def note(window, gradient):
        names.add(window.name)
        add(window, gradient)

    Window.add = note
    try:
        yield names
    finally:
        Window.add = add


def trained(
    rank,
    mode="auto",
    dtype=torch.float32,
    *,
    steps=STEPS,
    no_sync=False,
    mesh=None,
    policy=None,
    checkpointed=False,
    **options,
):
    model = net(dtype)
    model.checkpointed = checkpointed
    shape = {} if mesh is None else {"mesh": mesh_of(*mesh, names=("replicate", "shard"))}
    sharded(model, **shape, **({} if policy is None else {"mp_policy": policy}))
    opt = optimizer(model, **options)
    if mode != "dense":
        opt.attach(model, mode)

    @contextmanager
    def before(number):
        if no_sync:
            model.set_requires_gradient_sync(number == 1)
        yield
        if no_sync and mode == "release":
            # Else FSDP would hold the gradients in full until a later backward.
            assert not windows(opt.handle)["up.weight"].empty

    return outcome(model, opt, train(model, opt, steps, rank, before=before))


def sketches_only(rank):
    """Return which parameters' dense gradients are seen after the first window."""
    model = sharded(net())
    opt = optimizer(model)
    opt.attach(model)
    train(model, opt, 1, rank)
    with added() as names:
        train(model, opt, 1, rank)
    return names


def swapped(rank):
    """As accelerate does: the model is sharded after attach, and the optimizer gets the new parameters."""
    model = net()
    opt = optimizer(model)
    opt.attach(model)
    names = {p: name for name, p in model.named_parameters()}
    sharded(model)
    new = dict(model.named_parameters())
    for group in opt.param_groups:
        group["params"] = [new[names[p]] for p in group["params"]]
    with added() as seen:
        norms = train(model, opt, STEPS, rank)
    return outcome(model, opt, norms), "up.weight" in seen, len(opt.state_dict()["state"])


def authors(rank, model=None):
    """The authors' step starts from the weights and reads the whole gradient twice."""
    model = sharded(net()) if model is None else model
    opt = AuthorsMFSGD([model.up.weight, model.down.weight], rank=2, nesterov=True)
    return outcome(model, opt, train(model, opt, STEPS, rank))


def resumed(rank):
    """Two steps, then two more of another optimizer with the first one's state, which was saved whole."""
    model = sharded(net())
    opt = optimizer(model)
    train(model, opt, STEPS, rank)
    unbroken = outcome(model, opt, [])
    model = sharded(net())
    opt = optimizer(model)
    norms = train(model, opt, 2, rank)
    other = optimizer(model)
    saved = opt.state_dict()
    saved["state"] = {i: {key: whole(value) for key, value in entry.items()} for i, entry in saved["state"].items()}
    other.load_state_dict(saved)
    norms += train(model, other, STEPS - 2, rank, first=2)
    return unbroken, outcome(model, other, [])


def message(function, *args, **kwargs):
    """Return what `function` refuses."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "not refused"


def refusals(rank):
    mesh, tp = mesh_of(2), mesh_of(2, names=("tp",))
    weight = torch.randn(8, 6)
    of = lambda mesh, placement: nn.Parameter(distribute_tensor(weight, mesh, [placement]))  # noqa: E731
    found = {
        "columns": message(MoFaSGD, [of(mesh, Shard(1))], rank=2),
        "replicas": message(MoFaSGD, [of(mesh, Replicate())], rank=2),
        "tp": message(MoFaSGD, [of(tp, Shard(0))], rank=2),
    }
    model = sharded(net())
    found["complement"] = message(optimizer(model, complement=1.0).attach, model)
    opt = optimizer(model)
    found["step_in_backward"] = message(opt.attach, model, "release", step_in_backward=True)
    return found


def evaluated(rank):
    """An evaluation leaves the root's weights gathered; attaching after it works all the same."""
    model = sharded(net())
    opt = optimizer(model)
    with torch.no_grad():
        model(torch.zeros(2, 9, dtype=torch.long))
    assert not isinstance(model.raw, DTensor)
    opt.attach(model)
    return outcome(model, opt, train(model, opt, STEPS, rank))


def hooked_later(rank):
    """Within a window rank 0 hooks a gradient, which FSDP never shows, and both hook an accumulated one."""
    model, seen = sharded(net()), []
    opt = optimizer(model)
    opt.attach(model)
    hooks = iter([False, True])

    @contextmanager
    def before(number):
        if number == 1 and next(hooks, False):
            model.down.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad is not None))
            if rank == 0:
                model.up.weight.register_hook(lambda G: seen.append("gradient"))
        yield

    return outcome(model, opt, train(model, opt, STEPS, rank, before=before)), seen


CASES = {
    f"{mode} {name}": functools.partial(trained, mode=mode, dtype=dtype)
    for mode in MODES
    for name, dtype in DTYPES.items()
} | {
    "dense clipped": functools.partial(trained, mode="dense", max_grad_norm=0.1, weight_decay=0.1),
    "auto clipped": functools.partial(trained, max_grad_norm=0.1, weight_decay=0.1),
    "complement": functools.partial(trained, mode="dense", complement=1.0, weight_decay=0.1),
    "authors": authors,
    "dense policy": functools.partial(trained, mode="dense", policy=POLICY),
    "auto policy": functools.partial(trained, policy=POLICY),
    "dense no_sync": functools.partial(trained, mode="dense", no_sync=True),
    "auto no_sync": functools.partial(trained, no_sync=True),
    "release no_sync": functools.partial(trained, mode="release", no_sync=True),
    "checkpointed": functools.partial(trained, checkpointed=True),
    "replicas of shards": functools.partial(trained, mesh=(1, 2)),
    "shards of replicas": functools.partial(trained, mesh=(2, 1), mode="release"),
    "dense shards of replicas": functools.partial(trained, mesh=(2, 1), mode="dense"),
    "rounded in shards": functools.partial(trained, mode="dense", dtype=torch.bfloat16, steps=1, weight_decay=0.1),
    "rounded whole": functools.partial(
        trained, mode="dense", dtype=torch.bfloat16, steps=1, mesh=(2, 1), weight_decay=0.1
    ),
    "sketches only": sketches_only,
    "swapped": swapped,
    "resumed": resumed,
    "refusals": refusals,
    "documented": functools.partial(documented, number=1, steps=2, fully_shard=fully_shard),
    "evaluated": evaluated,
    "hooked later": hooked_later,
}
