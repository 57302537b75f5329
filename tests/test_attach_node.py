"""The node of a sketched layer: its outputs and gradients, what it saves, and when it stands back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from mofasgd import MoFaSGD, param_groups

# Rank 2 starts matrices of at least 60 x 50 from the two sketches, smaller ones from the gradient itself.
M, N = 60, 50


VOCABULARY = 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_forward_is_the_layers_own_to_the_bit(dtype, autocast):
    layer = nn.Sequential(nn.Linear(N, M), nn.Embedding(VOCABULARY, N)).to(dtype)
    opt = MoFaSGD(param_groups(layer, rank=2, lr=0.05, factor=["1.weight"]))
    x, ids = torch.randn(3, 7, N).to(dtype), torch.randint(0, VOCABULARY, (3, 7))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = layer[0](x), layer[1](ids)
        with opt.attach(layer, "sketch"):
            found = layer[0](x), layer[1](ids)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
        assert a.dtype is b.dtype
        assert b.requires_grad
        assert b._base is None  # what follows may work in place


def window_of(opt):
    (window,) = opt._handle._windows.values()
    return window


def started(layer, **options):
    """Return `layer` attached, past its first window, its optimizer, and a copy of it that is not attached."""
    model = nn.Sequential(layer)
    opt = MoFaSGD(param_groups(model, rank=2, lr=0.05, factor=["*weight"]), **options)
    opt.attach(model)
    size = (torch.arange(9),) if isinstance(layer, nn.Embedding) else (torch.randn(9, N, dtype=layer.weight.dtype),)
    for _ in range(2):
        model(*size).square().mean().backward()
        opt.step()
        opt.zero_grad()
    assert not window_of(opt).pending
    return layer, opt, copy.deepcopy(layer)


@pytest.mark.parametrize("size", [(9, N), (3, 5, N), (1, N), (N,), "transposed"])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, False), (torch.float64, False), (torch.float32, True)])
def test_the_gradients_of_input_and_bias_are_the_layers_own_to_the_bit(dtype, autocast, size):
    layer, _opt, plain = started(nn.Linear(N, M).to(dtype), state_dtype=dtype)
    x = (torch.randn(N, 9).T if size == "transposed" else torch.randn(size)).to(dtype)
    found = []
    for module in (layer, plain):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(leaf)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
        found.append((leaf.grad, module.bias.grad))
    for a, b in zip(*found, strict=True):
        assert a.dtype is b.dtype is dtype
        assert torch.equal(a, b)


def test_autocast_casts_a_weight_once_however_often_it_is_used_and_backward_holds_no_copy():
    layer, opt, plain = started(nn.Linear(N, N, bias=False))
    saved = []
    for module in (layer, plain):
        kept = {}

        def pack(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
            y = torch.randn(9, N)
            for _ in range(4):
                y = module(y)
            # What a dense use of the weight finds in the cache leads to the weight.
            other = F.linear(y, module.weight)
        casts = next(e.count for e in profile.key_averages() if e.key == "aten::_to_copy")
        saved.append((casts, sum(kept.values())))
        (y.sum() + other.sum()).backward()
    assert saved[0][1] <= saved[1][1]
    # x and the weight once, as a dense layer; U and V once a step.
    assert saved[0][0] <= saved[1][0] + 2
    assert window_of(opt)._sketches is not None


def test_checkpointing_and_offloading_are_given_a_layers_input_alone():
    for layer, x in ((nn.Linear(N, M), torch.randn(9, N)), (nn.Embedding(VOCABULARY, N), torch.arange(9))):
        layer, _opt, _ = started(layer)
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, packed=packed: packed.append(t), lambda t: t):
            layer(x)
        assert [t.data_ptr() for t in packed] == [x.data_ptr()]


def test_a_weight_changed_before_backward_raises_where_the_inputs_gradient_needs_it():
    layer, opt, _ = started(nn.Linear(N, M))
    for needed in (False, True):
        y = layer(torch.randn(9, N, requires_grad=needed))
        with torch.no_grad():
            layer.weight.mul_(2)
        if needed:
            with pytest.raises(RuntimeError, match=r"'0.weight', needed for .* modified by an inplace operation"):
                y.sum().backward()
        else:
            y.sum().backward()
            assert not window_of(opt).empty


def test_held_forwards_work_after_detach():
    for layer, x in ((nn.Linear(N, M), torch.randn(9, N)), (nn.Embedding(VOCABULARY, N), torch.arange(9))):
        layer, opt, _ = started(layer)
        forward = layer.forward
        opt._handle.detach()
        assert torch.equal(forward(x), layer(x))
        forward(x).sum().backward()
        assert layer.weight.grad is not None


def test_a_weight_frozen_between_forward_and_backward_gets_nothing():
    for layer, x in ((nn.Linear(N, M), torch.randn(9, N)), (nn.Embedding(VOCABULARY, N), torch.arange(9))):
        layer, opt, _ = started(layer)
        window = window_of(opt)
        for frozen in (True, False):
            y = layer(x)
            layer.weight.requires_grad_(not frozen)
            y.sum().backward()
            layer.weight.requires_grad_(True)
            assert window.empty is frozen
            if isinstance(layer, nn.Linear):
                assert layer.bias.grad is not None


def test_what_the_node_does_not_know_runs_dense_and_the_net_takes_its_gradient():
    layer, opt, plain = started(nn.Linear(N, M).double(), state_dtype=torch.float64)
    window = window_of(opt)
    x, t = torch.randn(2, 9, N, dtype=torch.float64)

    def tangent(module):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x, t))).tangent

    def nested(layout):
        return lambda module: module(torch.nested.nested_tensor([x, x[:3]], layout=layout)).unbind()[1]

    for call in (
        lambda module: torch.vmap(module)(x),
        lambda module: torch.func.jvp(module, (x,), (t,))[1],
        lambda module: torch.func.grad(lambda x: module(x).square().sum())(x),
        tangent,
        nested(torch.jagged),
        nested(torch.strided),
        lambda module: module(x.to_sparse()),
    ):
        found, expected = call(layer), call(plain)
        assert torch.equal(found, expected)
        if found.requires_grad:
            plain.zero_grad()
            for y in (found, expected):
                y.square().sum().backward()
            G, own = plain.weight.grad, window.state
            for a, b in zip(window.sketches(own["U"], own["V"]), (G @ own["V"], G.T @ own["U"]), strict=True):
                torch.testing.assert_close(a[0], b)
        window.clear()


@pytest.mark.parametrize("shape", [(6, M, N), (6 * M, N)])
def test_release_casts_a_gradient_tile_by_tile(monkeypatch, shape):
    monkeypatch.setattr("mofasgd.attach.window._TILE", 40 * N)
    model = nn.ParameterDict({"stack": nn.Parameter(torch.randn(shape, dtype=torch.bfloat16))})
    opt = MoFaSGD(param_groups(model, rank=2, lr=0.05, factor=["stack"]))
    opt.attach(model, "release")
    gradients = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(2)]
    for _ in range(2):
        for G in gradients:
            with torch.profiler.profile(record_shapes=True) as profile:
                window_of(opt).add(G)
            made = [e.input_shapes[0] for e in profile.events() if e.name == "aten::_to_copy" and e.input_shapes]
            assert all(torch.Size(s).numel() <= 40 * N for s in made if s[-1:] == [N])
        window, total = window_of(opt), sum(G.double() for G in gradients)
        if window.pending:
            right, left = window.first.right(total.device).double(), window.first.left(total.device).double()
            found = window._start
        else:
            right, left = window.state["V"].double(), window.state["U"].double()
            found = window._sketches
        for a, b in zip(found, (total @ right, total.mT @ left), strict=True):
            torch.testing.assert_close(a.double().view(b.shape), b, rtol=1e-5, atol=1e-3)
        opt.step()
        opt.zero_grad()
