"""Attaching, loading and stepping that fail or meet odd classes: the model is left as it was, nothing is used up."""

import copy

import pytest
import torch
from torch import nn

from mofasgd import MoFaSGD
from mofasgd.attach import detach


def test_a_model_can_be_detached_without_its_handle():
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    opt = MoFaSGD([p for p in model.parameters() if p.ndim == 2], rank=2)
    for bias in (model[0].bias, model[1].bias):
        bias.requires_grad_(False)
    opt.attach(model)
    assert opt.handle.mode == "auto"
    with pytest.raises(ValueError, match=r"call mofasgd\.attach\.detach\(model\) first"):
        MoFaSGD([p for p in model.parameters() if p.ndim == 2], rank=2).attach(model)
    assert detach(model)
    assert opt.handle is None
    assert not detach(model)
    model(torch.randn(3, 12)).sum().backward()
    assert model[0].weight.grad is not None


def matrices(model):
    return [p for p in model.parameters() if p.ndim == 2]


def pair():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10, bias=False), nn.Linear(10, 8, bias=False))


def moves(model, opt):
    """Whether a step moves every weight."""
    before = [p.detach().clone() for p in matrices(model)]
    model(torch.randn(5, 12)).square().sum().backward()
    opt.step()
    return [not torch.equal(p, q) for p, q in zip(matrices(model), before, strict=True)]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_attach_that_fails_half_way_leaves_the_model_as_it_was(monkeypatch, error):
    from mofasgd.attach import handle

    model = pair()
    opt = MoFaSGD(matrices(model), rank=2)
    original, calls = handle.swap_in, []

    def fail_second(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise error
        original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(handle, "swap_in", fail_second)
        with pytest.raises(error):
            opt.attach(model)
    assert opt.handle is None
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]
    assert not any(p._post_accumulate_grad_hooks for p in matrices(model))
    assert moves(model, opt) == [True, True]
    opt.attach(model)
    assert moves(model, opt) == [True, True]


def test_registries_of_the_users_classes_do_not_see_the_mixed_ones():
    registry = {}

    class Base(nn.Linear):
        def __init_subclass__(cls, *, key, **kwargs):
            registry[key] = cls

    class Own(Base, key="own"):
        pass

    model = nn.Sequential(Own(12, 10))
    opt = MoFaSGD(matrices(model), rank=2)
    model[0].bias.requires_grad_(False)
    opt.attach(model)
    assert registry == {"own": Own}


def test_a_copy_made_by_the_attached_class_can_be_attached_itself():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 10, bias=False)

        def forward(self, x):
            return self.layer(x)

    model = Net()
    opt = MoFaSGD(matrices(model), rank=2)
    opt.attach(model)
    twin = type(model)()
    other = MoFaSGD(matrices(twin), rank=2)
    other.attach(twin)
    assert moves(twin, other) == [True]
    assert moves(model, opt) == [True]
    other.handle.detach()
    assert type(twin) is Net


def test_a_state_that_cannot_be_attached_is_refused_before_it_is_loaded():
    model, plain = pair(), pair()
    saved = MoFaSGD(matrices(plain), rank=2, complement=1.0).state_dict()
    opt = MoFaSGD(matrices(model), rank=2)
    opt.attach(model)
    with pytest.raises(ValueError, match=r"complement=1\.0 needs the full gradient"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["complement"] == 0.0
    assert moves(model, opt) == [True, True]


def test_inference_mode_is_refused():
    model = pair()
    opt = MoFaSGD(matrices(model), rank=2)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"attach inside torch\.inference_mode"):
        opt.attach(model)


@pytest.mark.parametrize("first_window", [True, False])
def test_a_refused_step_uses_up_no_sketch(first_window):
    model = pair()
    opt = MoFaSGD([{"params": [p]} for p in matrices(model)], rank=2)
    opt.attach(model)
    assert first_window or moves(model, opt) == [True, True]
    before = [p.detach().clone() for p in matrices(model)]
    model(torch.randn(5, 12)).square().sum().backward()
    opt.param_groups[1]["rank"] = 3
    with pytest.raises(ValueError, match="rank of a running optimizer is fixed"):
        opt.step()
    opt.param_groups[1]["rank"] = 2
    opt.step()
    assert not any(torch.equal(p, q) for p, q in zip(matrices(model), before, strict=True))


def test_state_that_was_cleared_is_made_anew():
    model = pair()
    opt = MoFaSGD(matrices(model), rank=2)
    opt.attach(model)
    assert moves(model, opt) == [True, True]
    opt.state.clear()
    assert moves(model, opt) == [True, True]


def test_a_window_that_is_open_while_a_state_is_loaded_is_dropped():
    model = pair()
    opt = MoFaSGD(matrices(model), rank=2)
    opt.attach(model)
    assert moves(model, opt) == [True, True]
    saved = copy.deepcopy(opt.state_dict())
    before = [p.detach().clone() for p in matrices(model)]
    model(torch.randn(5, 12)).square().sum().backward()
    opt.load_state_dict(saved)
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(matrices(model), before, strict=True))


def test_layers_in_bfloat16_sketch_by_the_newest_factors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10, bias=False)).bfloat16()
    (weight,) = model.parameters()
    opt = MoFaSGD([weight], rank=2, lr=0.01)
    opt.attach(model)
    for _ in range(3):
        model(torch.randn(5, 12).bfloat16()).square().sum().backward()
        opt.step()
        opt.zero_grad()
    x, twin = torch.randn(5, 12).bfloat16(), copy.deepcopy(model)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    U, _, V = opt.factors(weight)
    window = opt.handle._windows[weight]
    GV, GtU = (part[0] for part in window.sketches(U[None], V[None]))
    G = twin[0].weight.grad.float()
    # Operands and gradient are rounded to 8 bits; by old factors the sketches would be others altogether.
    for found, wanted in ((GV, G @ V), (GtU, G.mT @ U)):
        assert (found - wanted).norm() <= 0.02 * wanted.norm()


def test_casts_are_the_newest_factors_after_layers_started_were_regrouped_frozen_and_thawed():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(4))).bfloat16()
    first, second, third, fourth = model.parameters()
    nn.init.zeros_(third)  # those before it get no gradient in the first step, and start at the second
    opt = MoFaSGD([first, second, third], rank=2, lr=0.01)
    fourth.requires_grad_(False)
    opt.attach(model)

    def train(count):
        for _ in range(count):
            (model(torch.randn(5, 12).bfloat16()) - 1).square().sum().backward()
            opt.step()
        for p, window in opt.handle._windows.items():
            for key, cast in zip("UV", window.cast(torch.bfloat16), strict=True):
                assert torch.equal(cast, opt.state[p][key].bfloat16())
        return len(opt.handle._windows)

    assert train(4) == 3
    opt.add_param_group({"params": [opt.param_groups[0]["params"].pop()]})
    assert train(2) == 3
    first.requires_grad_(False)
    assert train(2) == 2
    first.requires_grad_(True)
    assert train(4) == 3


def test_a_step_refused_for_one_group_leaves_the_sketches_of_all():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(24, 24, bias=False), nn.Linear(24, 16, bias=False))]
    nets.append(copy.deepcopy(nets[0]))
    opts = [MoFaSGD([{"params": layer.parameters()} for layer in net], rank=3) for net in nets]
    x = torch.randn(9, 24)
    for net, opt in zip(nets, opts, strict=True):
        opt.attach(net)
        net(x).square().sum().backward()
    opts[0].param_groups[1]["complement"] = 1.0
    with pytest.raises(ValueError, match="complement"):
        opts[0].step()
    opts[0].param_groups[1]["complement"] = 0.0
    for opt in opts:
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_a_parameter_whose_number_changes_keeps_what_it_has_gathered():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(24, 24, bias=False), nn.Linear(24, 16, bias=False))]
    nets.append(copy.deepcopy(nets[0]))
    opts = [MoFaSGD(net.parameters(), rank=3) for net in nets]
    opts[0].attach(nets[0])
    x = torch.randn(4, 9, 24)
    for net, opt in zip(nets, opts, strict=True):
        for i in range(2):
            net(x[i]).square().sum().backward()
            opt.step()
            opt.zero_grad()
        net(x[2]).square().sum().backward()
        frozen = opt.param_groups[0]["params"].pop(0).requires_grad_(False)
        frozen.grad = None
        net(x[3]).square().sum().backward()
        opt.step()
    found, expected = (opt.momentum(net[1].weight) for net, opt in zip(nets, opts, strict=True))
    assert (found - expected).norm() <= 1e-5 * expected.norm()
