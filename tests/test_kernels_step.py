"""Whole steps by kernels, in Triton's interpreter, beside those by torch: test_gpu.py trains where there is a GPU."""

import pytest
import torch

from mofasgd import MoFaSGD, algebra, columns, factored, gradient

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py trains there"),
]


def use_kernels(monkeypatch):
    for module in (algebra, columns, factored, gradient):
        monkeypatch.setattr(module, "usable", lambda device: True)


@pytest.mark.parametrize("complement", [0.0, 1.0])
def test_a_step_by_kernels_is_seen_by_autograd_and_leaves_the_state_whole(complement, monkeypatch):
    use_kernels(monkeypatch)
    W = torch.nn.Parameter(torch.randn(40, 24))
    opt = MoFaSGD([W], lr=0.1, rank=3, complement=complement)
    for _ in range(2):
        before = [W._version, *(opt.state[W][key]._version for key in ("U", "V") if W in opt.state)]
        W.grad = torch.randn(40, 24)
        opt.step()
    after = [W._version, *(opt.state[W][key]._version for key in ("U", "V"))]
    assert all(new > old for new, old in zip(after, before, strict=True))
    state = {key: value.clone() for key, value in opt.state[W].items()}

    def full(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(factored, "residual_factors" if complement else "store", full)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step()
    assert all(torch.equal(value, state[key]) for key, value in opt.state[W].items())


@pytest.mark.parametrize(
    ("shape", "rule"),
    [((40, 24), "spectral"), ((40, 24), "match_rms_adamw"), ((3, 40, 24), "match_rms_adamw")],
)
def test_a_step_in_place_is_the_step_beside(shape, rule, monkeypatch):
    def train():
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
        opt = MoFaSGD(weights, lr=0.1, rank=3, weight_decay=0.1, lr_scale=rule, max_grad_norm=1.0)
        for i in range(4):
            for k, W in enumerate(weights):
                W.grad = torch.randn(shape)
                if i == 2:
                    # One without a gradient, one that is not finite in a slice, one of zeros there.
                    W.grad = None if k == 0 else W.grad.index_fill(0, torch.tensor(1), [0, torch.nan, 0][k])
            opt.step()
        return opt, weights

    expected, theirs = train()
    use_kernels(monkeypatch)
    found, ours = train()
    for W, other in zip(ours, theirs, strict=True):
        assert torch.allclose(W, other, rtol=1e-4, atol=1e-5)
        assert torch.allclose(found.momentum(W), expected.momentum(other), rtol=1e-4, atol=1e-5)
        assert torch.equal(found.state[W]["step"], expected.state[other]["step"])


@pytest.mark.parametrize(
    ("dtype", "solver"), [(torch.float32, "gram"), (torch.float32, "svd"), (torch.bfloat16, "gram")]
)
def test_a_step_with_the_complement_is_the_step_by_torch(dtype, solver, monkeypatch):
    torch.manual_seed(0)
    # Momenta of rank 2 have a completion column, by which the next gradient is sketched; stacks start in two windows.
    low = torch.randint(-3, 4, (2, 40, 2)).float() @ torch.randint(-3, 4, (2, 2, 24)).float()
    windows = [[low, low.index_fill(0, torch.tensor(1), 0)]]
    windows += [[torch.randn(2, 40, 24) for _ in range(2)] for _ in range(2)]

    def train():
        weights = [torch.nn.Parameter(torch.zeros(2, 40, 24, dtype=dtype)) for _ in range(2)]
        opt = MoFaSGD(weights, lr=0.1, rank=3, complement=1.0, solver=solver)
        for grads in windows:
            for W, G in zip(weights, grads, strict=True):
                W.grad = G.to(dtype)
            opt.step()
        return opt, weights

    expected, theirs = train()
    use_kernels(monkeypatch)
    found, ours = train()
    # Factors are rounded to the gradient's dtype, and some elements of a weight to another neighbour.
    near = 1e-6 if dtype is torch.float32 else 2**-7
    for W, other in zip(ours, theirs, strict=True):
        assert (W - other).abs().max() <= near * other.abs().max()
        M, wanted = found.momentum(W), expected.momentum(other)
        assert (M - wanted).abs().max() <= near * wanted.abs().max()
