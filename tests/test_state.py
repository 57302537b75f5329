"""Optimizer state: what it holds, that it survives files and other libraries, and that resume changes no bit."""

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from common import gradients, run, weight
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from mofasgd import MoFaSGD, param_groups
from mofasgd.factored import Update


def make(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(30, 70), nn.Linear(70, 60), nn.Tanh(), nn.Linear(60, 9)).to(dtype)
    opt = MoFaSGD(param_groups(model, rank=4, complement=1.0, weight_decay=0.1), max_grad_norm=1.0, **options)
    return model, opt


def train(model, opt, steps):
    for i in steps:
        torch.manual_seed(i)
        tokens, target = torch.randint(0, 30, (40,)), torch.randint(0, 9, (40,))
        nn.functional.cross_entropy(model(tokens).float(), target).backward()
        opt.step()
        opt.zero_grad()


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(model, opt, other, twin):
    pairs = zip(opt.state_dict()["state"].values(), twin.state_dict()["state"].values(), strict=True)
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)) and all(
        torch.equal(s[k], t[k]) and s[k].dtype == t[k].dtype for s, t in pairs for k in s
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_resume_changes_no_bit(dtype, stop):
    model, opt = make(dtype)
    train(model, opt, range(15))
    first, before = make(dtype)
    train(first, before, range(stop))
    saved = through_a_file({"model": first.state_dict(), "optimizer": before.state_dict()})
    second, after = make(dtype, seed=99)
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["optimizer"])
    train(second, after, range(stop, 15))
    assert same(model, opt, second, after)


def test_state_is_tensors_of_the_documented_shapes_and_dtypes():
    model, opt = make(torch.bfloat16)
    train(model, opt, range(2))
    U = opt.state[model[1].weight]
    assert {k: (tuple(v.shape), v.dtype) for k, v in U.items()} == {
        "U": ((60, 4), torch.float32),
        "s": ((4,), torch.float32),
        "V": ((70, 4), torch.float32),
        "initialized": ((), torch.bool),
        "step": ((), torch.float32),
    }
    moments = opt.state[model[0].weight]
    assert {k: v.dtype for k, v in moments.items()} == dict.fromkeys(["exp_avg", "exp_avg_sq", "step"], torch.float32)
    saved = opt.state_dict()
    assert isinstance(saved["nonfinite_steps"], int)
    assert all(isinstance(v, torch.Tensor) for s in saved["state"].values() for v in s.values())


def test_loading_copies_and_keeps_float32_factors_of_bfloat16_weights():
    model, opt = make(torch.bfloat16)
    train(model, opt, range(2))
    other, twin = make(torch.bfloat16)
    saved = opt.state_dict()
    seen = []
    twin.register_load_state_dict_post_hook(lambda o: seen.append(o.factors(other[1].weight).U.dtype))
    twin.load_state_dict(saved)
    assert seen == [torch.float32]
    kept = saved["state"][0]["U"].clone()
    train(other, twin, range(3))
    assert torch.equal(saved["state"][0]["U"], kept)


def test_a_user_hook_may_still_rewrite_what_is_loaded():
    model, opt = make()
    train(model, opt, range(2))
    other, twin = make()

    def double(_, loaded):
        state = {i: {k: 2 * v if k == "s" else v for k, v in s.items()} for i, s in loaded["state"].items()}
        return {**loaded, "state": state}

    twin.register_load_state_dict_pre_hook(double)
    twin.load_state_dict(opt.state_dict())
    assert torch.equal(twin.factors(other[1].weight).s, 2 * opt.factors(model[1].weight).s)


def test_the_zero_gradient_step_of_checkpoint_libraries_leaves_matrices_pending():
    model, opt = make()
    weights = [p.detach().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, opt)  # takes a step with zero gradients and lr = 0
    state = opt.state[model[1].weight]
    assert not state["initialized"]
    assert state["U"].shape == (60, 4)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    fresh, twin = make()
    train(model, opt, range(1))
    train(fresh, twin, range(1))
    # AdamW has counted the step, as torch's does; the matrices start from their first real gradient.
    for i in (1, 3):
        assert opt.state[model[i].weight]["initialized"]
        assert torch.equal(opt.momentum(model[i].weight), twin.momentum(fresh[i].weight))
        assert torch.equal(model[i].weight, fresh[i].weight)


@pytest.mark.parametrize("trained", [0, 3])
def test_distributed_checkpoint_round_trip_with_names_is_exact(trained):
    model, opt = make()
    train(model, opt, range(trained))
    saved = through_a_file(get_optimizer_state_dict(model, opt))
    assert set(saved["state"]["1.weight"]) == {"U", "s", "V", "initialized", "step"}
    other, twin = make()
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, twin, saved)
    train(model, opt, range(trained, 8))
    train(other, twin, range(trained, 8))
    assert same(model, opt, other, twin)


def test_materialize_makes_all_state_and_changes_no_training():
    model, opt = make()
    opt.materialize()
    assert len(opt.state) == len(list(model.parameters()))
    other, twin = make()
    train(model, opt, range(4))
    train(other, twin, range(4))
    assert same(model, opt, other, twin)


def test_frozen_parameters_have_no_state():
    model, opt = make()
    frozen = [model[0].weight, model[1].weight]
    for param in frozen:
        param.requires_grad_(False)
    opt.materialize()
    train(model, opt, range(2))
    assert {p for p, s in opt.state.items() if s} == {p for p in model.parameters() if p.requires_grad}
    assert len(opt.state_dict()["state"]) == len(list(model.parameters())) - 2


def damaged(saved, kind):
    state, groups = saved["state"], saved["param_groups"]
    if kind == "rank":
        state[0]["U"] = state[0]["U"][:, :2]
    elif kind == "keys":
        del state[0]["V"]
    elif kind == "adamw":
        return torch.optim.AdamW(make()[0].parameters()).state_dict()
    elif kind == "groups":
        groups.pop()
    elif kind == "empty":
        return {}
    elif kind == "beta":
        groups[0]["beta"] = 7.0
    elif kind == "no rank":
        del groups[0]["rank"]
    elif kind in ("bfloat16", "float16"):
        state[0] = {k: v.to(getattr(torch, kind)) if k in "UsV" else v for k, v in state[0].items()}
    elif kind == "fresh sgd":
        fresh = torch.optim.SGD(make()[0].parameters(), lr=0.1).state_dict()
        return {**fresh, "param_groups": [{"params": g["params"]} for g in groups]}
    elif kind == "object":
        state[0]["s"] = [1.0, 2.0]
    return saved


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("rank", "'U' of parameter 0 should have shape"),
        ("keys", "should hold"),
        ("adamw", "groups of"),
        ("groups", "groups of"),
        ("empty", "no optimizer state_dict"),
        ("object", "'s' of parameter 0"),
        ("beta", "beta=7.0 should be"),
        ("no rank", "lacks its key 'rank'"),
        ("bfloat16", "is torch.bfloat16: something cast it"),
        ("float16", "is torch.float16: something cast it"),
        ("fresh sgd", "saved by another optimizer"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(kind, message):
    model, opt = make()
    train(model, opt, range(2))
    other, twin = make()
    train(other, twin, range(2))
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(damaged(through_a_file(opt.state_dict()), kind))
    train(model, opt, range(2, 4))
    train(other, twin, range(2, 4))
    assert same(model, opt, other, twin)


def test_state_of_another_optimizer_with_equal_groups_is_refused():
    W = nn.Parameter(torch.randn(9, 8))
    adamw, opt = torch.optim.AdamW([W]), MoFaSGD([W], rank=2)
    W.grad = torch.randn(9, 8)
    adamw.step()
    with pytest.raises(ValueError, match="saved by another optimizer"):
        opt.load_state_dict(adamw.state_dict())


def test_the_count_of_non_finite_steps_is_kept():
    W = nn.Parameter(torch.randn(9, 8))
    opt = MoFaSGD([W], rank=2)
    W.grad = torch.full((9, 8), float("nan"))
    opt.step()
    other = MoFaSGD([W], rank=2)
    with pytest.warns(UserWarning, match="1 steps had a gradient that was not finite"):
        saved = opt.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        opt.state_dict()
        other.load_state_dict(through_a_file(saved))
        assert other.nonfinite_steps == 1


def test_loaded_state_takes_the_state_dtype_of_the_optimizer():
    W = nn.Parameter(torch.randn(9, 8, dtype=torch.float64))
    opt = MoFaSGD([W], rank=2)
    W.grad = torch.randn(9, 8, dtype=torch.float64)
    opt.step()
    other = MoFaSGD([W], rank=2, state_dtype=torch.float64)
    other.load_state_dict(opt.state_dict())
    assert other.factors(W).U.dtype is torch.float64
    assert torch.equal(other.factors(W).s.float(), opt.factors(W).s)


@pytest.mark.parametrize("lost", ["cleared", "removed", "thawed"])
def test_state_that_is_missing_between_steps_is_made_at_the_next(lost):
    a, b = (nn.Parameter(torch.randn(9, 8)) for _ in range(2))
    opt = MoFaSGD([a, b], rank=2)
    b.requires_grad_(lost != "thawed")

    def step():
        for p in (a, b):
            p.grad = torch.randn(9, 8) if p.requires_grad else None
        opt.step()

    step(), step()
    if lost == "cleared":
        opt.state[b].clear()
    elif lost == "removed":
        del opt.state[b]
    b.requires_grad_(True)
    before = b.detach().clone()
    # Set anew, it starts as at the first step, and moves.
    step()
    assert opt.state[b]["step"] == 1
    assert not torch.equal(b, before)


def test_state_of_no_parameter_is_refused():
    W = weight(6, 5)
    opt = MoFaSGD([W], rank=2)
    run(opt, [W], gradients((6, 5), 2))
    saved = opt.state_dict()
    saved["state"] = {str(key): value for key, value in saved["state"].items()}
    with pytest.raises(ValueError, match=r"parameters \['0'\], which no saved group has"):
        MoFaSGD([W], rank=2).load_state_dict(saved)


def test_the_count_of_bad_steps_is_what_a_users_hook_makes_of_it():
    W = weight(6, 5)
    opt = MoFaSGD([W], rank=2)
    opt.register_load_state_dict_pre_hook(lambda _, saved: saved | {"nonfinite_steps": 7})
    opt.load_state_dict(MoFaSGD([W], rank=2).state_dict())
    assert opt.nonfinite_steps == 7


def layers(attach=False, **options):
    """Return two layers of one shape and one of another, and their optimizer, after two steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False), nn.Linear(24, 16, bias=False))
    opt = MoFaSGD(net.parameters(), rank=3, lr=0.01, **options)
    if attach:
        opt.attach(net)
    for i in range(2):
        back(net, i)
        opt.step()
        opt.zero_grad()
    return net, opt


def back(net, seed):
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(seed))
    net(x).tanh().square().sum().backward()


def renewed(net, opt, attach=False):
    """Return a copy of the layers and an optimizer that has loaded the state."""
    net = copy.deepcopy(net).requires_grad_()
    other = MoFaSGD(net.parameters(), rank=3, lr=0.01)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    if attach:
        other.attach(net)
    return net, other


def assert_same_steps(net, opt, attach=False):
    """Hold that the optimizer steps as one that has loaded its state."""
    pairs = [(net, opt), renewed(net, opt, attach)]
    for i in range(10, 12):
        for model, one in pairs:
            model.zero_grad()
            back(model, i)
            one.step()
    for p, q in zip(*(model.parameters() for model, _ in pairs), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
def test_after_a_step_that_failed_midway_another_steps_by_what_is_there(fresh, attach, monkeypatch):
    net, opt = layers(attach)
    if fresh:
        opt.state.clear()
    back(net, 5)
    gradients = [] if attach else [weakref.ref(p.grad) for p in net.parameters()]
    take, calls = Update.take, iter([True, False])

    def failing(self, *args):
        if not next(calls):
            raise torch.OutOfMemoryError
        take(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Update, "take", failing)
        with pytest.raises(torch.OutOfMemoryError):
            opt.step()
    opt.zero_grad()
    gc.collect()
    assert not any(ref() is not None for ref in gradients)
    assert_same_steps(net, opt, attach)


@pytest.mark.parametrize("attach", [False, True])
def test_state_put_in_place_of_another_is_what_steps(attach):
    net, opt = layers(attach)
    first, second, _ = net.parameters()
    # Reset: it starts anew.
    opt.state[first] = {key: torch.zeros_like(value) for key, value in opt.state[first].items()}
    for value in opt.state[second].values():
        value.data = value.data.clone()
    before = first.detach().clone()
    assert_same_steps(net, opt, attach)
    assert not torch.equal(first, before)
    opt.state.clear()
    assert_same_steps(net, opt, attach)


def test_looking_at_the_state_of_a_frozen_parameter_changes_nothing():
    net, opt = layers()
    net[0].weight.requires_grad_(False)
    del opt.state[net[0].weight]
    back(net, 5)
    opt.step()
    assert not opt.state[net[0].weight]
    opt.zero_grad()
    found = []
    for i in range(2):
        back(net, i)
        opt.step()
        found.append(opt._arrangement)
    assert found[0] is found[1]
