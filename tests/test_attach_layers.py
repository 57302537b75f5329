"""Every kind of layer and every odd use of one: attached training against dense training, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from attached import distance, windows
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from mofasgd import MoFaSGD, param_groups

# Rank 2 starts matrices of at least 60 x 50 from the two sketches, smaller ones from the gradient itself.
M, N = 60, 50


class Net(nn.Module):
    """A body that each case replaces; `first` and `last` around it."""

    def __init__(self, body, call=None, first=(N, M), last=(M, N), vocabulary=None, **embedding):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, N, **embedding) if vocabulary else None
        self.first, self.body, self.last = nn.Linear(*first), body, nn.Linear(*last, bias=False)
        self.call = call or (lambda net, h: net.body(h))

    def forward(self, x):
        x = x if self.tokens is None else self.tokens(x)
        return self.last(torch.tanh(self.call(self, torch.tanh(self.first(x)))))


class Experts(nn.Module):
    """A stack of matrices and a raw one; the last expert is never used."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, M, M) / M**0.5)
        self.raw = nn.Parameter(torch.randn(M, M) / M**0.5)

    def forward(self, h):
        return sum(F.linear(h, expert) for expert in self.experts[:2]) + F.linear(h, self.raw)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(M, M, 3, padding=1)

    def forward(self, h):
        return self.conv(h.mT).mT


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(M, 4, batch_first=True)

    def forward(self, h):
        return self.attention(h, h, h, need_weights=False)[0]


def squares(net, x):
    return net(x).square().mean()


def penalized(net, x):
    return squares(net, x) + 1e-3 * net.body.weight.pow(4).sum() + 1e-3 * net.last.weight.pow(4).sum()


def fused(net, x):
    # As liger's and other fused losses: the head's weight is read, its forward is not called; here both.
    h = torch.tanh(net.first(x))
    return F.linear(h, net.last.weight).square().mean() + 0.3 * squares(net, x)


def tied(net, x):
    logits = F.linear(net(x), net.tokens.weight)
    return F.cross_entropy(logits.flatten(0, -2), x.flatten())


def tied_by_module(net, x):
    return F.cross_entropy(net.body(net.tokens(x)).flatten(0, -2), x.flatten())


def two_layers():
    return nn.Sequential(nn.Linear(M, 2 * M), nn.ReLU(inplace=True), nn.Linear(2 * M, M))


def tie(net):
    net.body.weight = net.tokens.weight
    return net


def with_checkpoint(reentrant):
    return lambda net, h: checkpoint(net.body, h, use_reentrant=reentrant)


def linear():
    return nn.Linear(M, M)


VOCABULARY = 70
# name: model, loss, input dimensions or None for tokens, modes of some parameters
CASES = {
    "plain": (lambda: Net(two_layers()), squares, (5, 7, N), {"body.0.weight": "sketch", "last.weight": "sketch"}),
    "one dimension": (lambda: Net(linear()), squares, (N,), {"body.weight": "sketch"}),
    "four dimensions": (lambda: Net(linear()), squares, (2, 3, 4, N), {"body.weight": "sketch"}),
    "no rows": (lambda: Net(linear()), lambda net, x: net(x[:0]).sum() + squares(net, x), (5, 7, N), {}),
    "called twice": (lambda: Net(linear(), lambda net, h: net.body(net.body(h))), squares, (5, N), {}),
    "reentrant checkpoint": (lambda: Net(two_layers(), with_checkpoint(True)), squares, (5, N), {}),
    "checkpoint": (lambda: Net(two_layers(), with_checkpoint(False)), squares, (5, N), {}),
    "multihead attention": (
        lambda: Net(Attention()),
        squares,
        (5, 7, N),
        {"body.attention.in_proj_weight": "release", "body.attention.out_proj.weight": "sketch"},
    ),
    "weight penalty": (lambda: Net(linear()), penalized, (5, N), {"body.weight": "sketch"}),
    "fused loss": (lambda: Net(linear()), fused, (5, N), {"last.weight": "sketch"}),
    "stack and raw matrix": (
        lambda: Net(Experts()),
        squares,
        (5, 7, N),
        {"body.experts": "release", "body.raw": "release"},
    ),
    "convolution": (lambda: Net(Convolution()), squares, (5, 7, N), {"body.conv.weight": "release"}),
    "embedding": (lambda: Net(linear(), vocabulary=VOCABULARY), squares, None, {"tokens.weight": "sketch"}),
    "embedding with padding": (lambda: Net(linear(), vocabulary=VOCABULARY, padding_idx=3), squares, None, {}),
    "embedding by frequency": (
        lambda: Net(linear(), vocabulary=VOCABULARY, scale_grad_by_freq=True),
        squares,
        None,
        {"tokens.weight": "release"},
    ),
    "embedding of bounded norm": (lambda: Net(linear(), vocabulary=VOCABULARY, max_norm=1.0), squares, None, {}),
    "tied to a raw product": (lambda: Net(linear(), vocabulary=VOCABULARY, padding_idx=3), tied, None, {}),
    "tied embedding and head": (
        lambda: tie(Net(nn.Linear(N, VOCABULARY), vocabulary=VOCABULARY, padding_idx=3, last=(N, N))),
        tied_by_module,
        None,
        {"tokens.weight": "sketch"},
    ),
    "computed weight": (
        lambda: Net(parametrizations.weight_norm(linear())),
        squares,
        (5, N),
        {"body.parametrizations.weight.original1": "release"},
    ),
}


def batch(size, generator):
    if size is None:
        return torch.randint(0, VOCABULARY, (4, 6), generator=generator)
    return torch.randn(size, dtype=torch.float64, generator=generator)


def run(model, loss, size, mode, steps=4, micro=2):
    model = copy.deepcopy(model)
    opt = MoFaSGD(
        param_groups(model, rank=2, lr=0.05, factor=["*weight*"] if size is None else ()),
        max_grad_norm=0.1,
        state_dtype=torch.float64,
    )
    handle = None if mode is None else opt.attach(model, mode)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for _ in range(micro):
            loss(model, batch(size, generator)).backward()
            if handle is not None:
                factored = (p for g in opt.param_groups if g["algorithm"] == "mofasgd" for p in g["params"])
                assert all(p.grad is None for p in factored)
        opt.step()
        opt.zero_grad()
    return model, opt, handle


@pytest.mark.parametrize("mode", ["auto", "release"])
@pytest.mark.parametrize("name", CASES)
def test_attached_training_is_dense_training(name, mode):
    make, loss, size, expected = CASES[name]
    start = make().double()
    dense, opt, _ = run(start, loss, size, None)
    attached, other, handle = run(start, loss, size, mode)
    # Sums in another order, in float64.
    assert distance(attached, dense, start) <= 1e-9
    assert other.grad_norm().item() == pytest.approx(opt.grad_norm().item(), rel=1e-9)
    modes = {row.name: row.mode for row in handle.rows}
    assert {key: modes[key] for key in expected} == (expected if mode == "auto" else dict.fromkeys(expected, "release"))


def test_sparse_embeddings_are_sketched_though_their_gradient_could_not_be_stepped():
    start = Net(linear(), vocabulary=VOCABULARY).double()
    dense, _, _ = run(start, squares, None, None)
    start.tokens.sparse = True
    attached, _, _ = run(start, squares, None, "sketch")
    assert distance(attached, dense, start) <= 1e-9
    with pytest.raises(ValueError, match=r"'tokens.weight' has a sparse gradient"):
        run(start, squares, None, "release")


def model_and_optimizer(mode="auto", **options):
    torch.manual_seed(0)
    model = Net(nn.ModuleDict({"used": linear(), "unused": linear()}), lambda net, h: net.body["used"](h))
    opt = MoFaSGD(param_groups(model, rank=2, lr=0.05), **options)
    if mode == "step":
        return model, opt, opt.attach(model, "release", step_in_backward=True)
    return model, opt, opt.attach(model, mode)


def test_unused_layers_stay_and_evaluation_changes_nothing():
    model, opt, handle = model_and_optimizer()
    x = torch.randn(9, N)
    before = copy.deepcopy(model)
    for _ in range(2):
        squares(model, x).backward()
        sums = {name: window.probes[0].grad.clone() for name, window in windows(handle).items() if window.ran}
        assert set(sums) == {"first.weight", "body.used.weight", "last.weight"}
        plain = copy.deepcopy(model)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert torch.equal(model.eval()(x), plain(x))
        assert all(torch.equal(windows(handle)[name].probes[0].grad, total) for name, total in sums.items())
        assert torch.equal(model.train()(x), plain(x))
        opt.step()
    assert torch.equal(model.body["unused"].weight, before.body["unused"].weight)
    assert not torch.equal(model.body["used"].weight, before.body["used"].weight)


@pytest.mark.parametrize("mode", ["auto", "release"])
def test_zero_gradients_move_nothing_and_leave_the_start_pending(mode):
    model, opt, _ = model_and_optimizer(mode, weight_decay=0.1)
    before = copy.deepcopy(model)
    for _ in range(2):
        (0 * squares(model, torch.randn(9, N))).backward()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True) if p.ndim == 2)
    assert not opt.state[model.last.weight]["initialized"]
    squares(model, torch.randn(9, N)).backward()
    opt.step()
    assert opt.state[model.last.weight]["initialized"]
    assert not torch.equal(model.last.weight, before.last.weight)


@pytest.mark.parametrize("mode", ["auto", "release", "step"])
@pytest.mark.parametrize("when", [0, 2])
def test_a_parameter_with_a_non_finite_sketch_is_left_and_counted(mode, when):
    model, opt, _ = model_and_optimizer(mode)
    for p in model.parameters():
        p.requires_grad_(p.ndim == 2)  # what is counted is the matrices'

    def spoil(layer, _, y):
        y.register_hook(lambda g: torch.where(torch.arange(g.numel()).view(g.shape) == 7, torch.inf, g))

    for i in range(4):
        before = copy.deepcopy(model)
        hook = model.body["used"].register_forward_hook(spoil) if i == when else None
        squares(model, torch.randn(9, N)).backward()
        opt.step()
        opt.zero_grad()
        if hook is not None:
            hook.remove()
        moved = {n: not torch.equal(p, before.get_parameter(n)) for n, p in model.named_parameters() if p.ndim == 2}
        reached = i != when
        assert moved == {
            "first.weight": reached,
            "body.used.weight": reached,
            "body.unused.weight": False,
            "last.weight": True,
        }
        assert all(p.isfinite().all() for p in model.parameters())
    assert opt.nonfinite_steps == 1


def test_double_backward_through_a_sketch_is_refused_and_released_gradients_allow_it():
    for mode in ("sketch", "release"):
        model, opt, _ = model_and_optimizer(mode)
        x = torch.randn(9, N, requires_grad=True)
        if mode == "sketch":
            with pytest.raises(RuntimeError, match=r"create_graph=True through 'last.weight'"):
                torch.autograd.grad(squares(model, x), x, create_graph=True)
            continue
        (g,) = torch.autograd.grad(squares(model, x), x, create_graph=True)
        g.square().sum().backward()
        opt.step()
        assert opt.state[model.first.weight]["initialized"]


def test_weights_put_in_place_of_the_attached_ones_get_their_own_gradients():
    model, opt, handle = model_and_optimizer()
    x = torch.randn(9, N)
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    squares(lambda x: torch.func.functional_call(model, others, (x,)), x).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(window.empty for window in windows(handle).values())
    squares(model, x).backward()
    opt.step()
    assert all((p.grad is None) is name.startswith("body.unused") for name, p in others.items())
