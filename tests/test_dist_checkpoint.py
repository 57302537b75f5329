"""`torch.distributed.checkpoint` of model and optimizer: by name, at any number of ranks, without loss."""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks_case import together
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mofasgd import MoFaSGD, param_groups

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def net(layers=3, width=24):
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*parts, nn.Linear(width, 8))


def made(engine, mode, world, **options):
    """Return a model, what is called of it, and its optimizer."""
    model = net()
    if world > 1 and engine == "fsdp2":
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
    opt = MoFaSGD(param_groups(model, rank=4, lr=0.05), **options)
    if mode is not None:
        opt.attach(model, mode=mode)
    called = DistributedDataParallel(model) if world > 1 and engine == "ddp" else model
    return model, called, opt


def take(called, opt, first, count, rank, world):
    for step in range(first, first + count):
        torch.manual_seed(100 + step)
        batch = torch.randn(8, 24)
        mine = batch[rank * 8 // world : (rank + 1) * 8 // world]
        called(mine).square().mean().backward()
        opt.step()
        opt.zero_grad()


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def content(model, opt):
    """Return all weights and state as plain arrays, by name."""
    names = {param: name for name, param in model.named_parameters()}
    found = {name: whole(param.detach()) for param, name in names.items()}
    found |= {f"{names[p]} {key}": whole(v) for p, state in opt.state.items() for key, v in state.items()}
    return {name: value.clone().numpy() for name, value in found.items()}


def phase(ranks, engine, mode, flat, first, count, load, save):
    """Load a checkpoint if there is one, take steps, save; return what was there after loading and at the end."""
    warnings.simplefilter("ignore")
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    load, save = (None if path is None else path / f"{engine}-{mode}-{flat}" for path in (load, save))
    model, called, opt = made(engine, mode, ranks.world)
    if load:
        weights, state = get_state_dict(called, opt, options=options)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=load)
        set_state_dict(called, opt, model_state_dict=weights, optim_state_dict=state, options=options)
    loaded = content(model, opt)
    take(called, opt, first, count, ranks.rank, ranks.world)
    end = content(model, opt)
    if save:
        weights, state = get_state_dict(called, opt, options=options)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=save)
    return loaded, end


def phases(ranks, *arguments):
    """Return the results of `phase` for all engines and modes, flat or not."""
    return [phase(ranks, *case, *arguments) for case in CASES]


def same(a, b):
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


MODES = (None, "auto", "release")
CASES = [(engine, mode, False) for engine in ("ddp", "fsdp2") for mode in MODES]
CASES += [("ddp", "auto", True), ("fsdp2", None, True)]


def test_a_resumed_run_is_bit_exact(tmp_path):
    unbroken = together(phases, 0, 6, None, None)
    first = together(phases, 0, 3, None, tmp_path)
    second = together(phases, 3, 3, tmp_path, None)
    for rank in (0, 1):
        for case, whole, before, after in zip(CASES, unbroken[rank], first[rank], second[rank], strict=True):
            assert same(before[1], after[0]), case
            assert same(whole[1], after[1]), case


def test_from_one_rank_to_two_and_back(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    (alone,) = together(phases, 0, 6, None, None, world=1)
    (first,) = together(phases, 0, 2, None, paths[0], world=1)
    second = together(phases, 2, 2, *paths)
    (third,) = together(phases, 4, 2, paths[1], None, world=1)
    for i, case in enumerate(CASES):
        assert all(same(first[i][1], rank[i][0]) for rank in second), case
        assert same(second[0][i][1], third[i][0]), case
        for name in alone[i][1]:
            if " " not in name:  # a weight; signs of the factors' columns are free
                assert abs(alone[i][1][name] - third[i][1][name]).max() < 1e-5, (case, name)


def counted(ranks, folder):
    counts = []
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model, _, opt = made("ddp", None, ranks.world)
        model(torch.full((4, 24), torch.inf)).sum().backward()
        opt.step()
        _, state = get_state_dict(model, opt, options=options)
        dcp.save(state, checkpoint_id=folder / str(flat))
        model, _, opt = made("ddp", None, ranks.world)
        weights, state = get_state_dict(model, opt, options=options)
        dcp.load(state, checkpoint_id=folder / str(flat))
        set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state, options=options)
        counts.append(opt.nonfinite_steps)
    return counts


def test_the_count_of_skipped_steps_is_kept(tmp_path):
    assert together(counted, tmp_path) == [[1, 1], [1, 1]]


def test_an_entry_is_saved_without_the_stack_that_it_is_a_view_of(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(16)))
    opt = MoFaSGD(model.parameters(), rank=16)
    for _ in range(2):
        model(torch.randn(4, 128)).square().mean().backward()
        opt.step()
    states = list(opt.state.values())
    assert states[0]["U"].untyped_storage().nbytes() == 16 * states[0]["U"].nbytes
    _, state = get_state_dict(model, opt)
    dcp.save(state, checkpoint_id=tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    payload = sum(value.nbytes for entry in states for value in entry.values())
    assert payload < size < 2 * payload
