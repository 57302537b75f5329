"""The update by Gram matrices against a dense float64 SVD: its budget on hard spectra, on a CPU and on a GPU."""

import math

import pytest
import torch
from test_robustness import kinds_of_gradient

from mofasgd import MoFaSGD, algebra, columns
from mofasgd.gradient import FirstWindow, first_factors
from mofasgd.layout import MatrixShape
from mofasgd.momentum import Factors, moving, real_factors, sketch
from mofasgd.solver import measure, problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# 2 r above the core that is solved at once goes through subspace iteration.
SIZES = [(60, 50, 4), (20, 24, 8), (50, 300, 8), (96, 96, 48)]
SIZES += [(600, 500, 128), (700, 300, 200), (4096, 1024, 32)] if DEVICE.type == "cuda" else []
DOUBLE = torch.float64


def frame(*shape):
    return torch.linalg.qr(torch.randn(shape, dtype=DOUBLE))[0]


def spectrum(kind, rank, batch):
    """Return (s, G's factors) of a momentum and a gradient."""
    s = {
        "decaying": torch.logspace(0, -8, rank, dtype=DOUBLE),
        "clustered": torch.ones(rank, dtype=DOUBLE),
        "rank deficient": torch.cat([torch.ones(1, dtype=DOUBLE), torch.zeros(rank - 1, dtype=DOUBLE)]),
    }
    return s.get(kind, torch.rand(rank, dtype=DOUBLE).sort(descending=True).values).expand(batch, rank)


def case(kind, m, n, rank, batch=3):
    """Return float64 U, s, V, G of `batch` matrices."""
    U, V, s = frame(batch, m, rank), frame(batch, n, rank), spectrum(kind, rank, batch)
    G = torch.randn(batch, m, n, dtype=DOUBLE) / math.sqrt(max(m, n))
    if kind == "decaying":
        size = min(m, n)
        G = (frame(batch, m, size) * torch.logspace(0, -9, size, dtype=DOUBLE)) @ frame(batch, n, size).mT
    if kind == "rank deficient":
        G = torch.randn(batch, m, 1, dtype=DOUBLE) @ torch.randn(batch, 1, n, dtype=DOUBLE)
    if kind == "zero":
        G = torch.zeros_like(G)
    if kind == "inside the momentum":
        G = U @ torch.randn(batch, rank, rank, dtype=DOUBLE) @ V.mT
    if kind == "nearly inside":
        G = U @ torch.randn(batch, rank, rank, dtype=DOUBLE) @ V.mT + 1e-4 * G
    if kind == "hinted":
        # One column of the sketch has a millionth of the direction that another one is made of.
        new = frame(batch, m, m)[:, :, -1:]
        new = new - U @ (U.mT @ new)
        G = U[:, :, :1] @ V[:, :, :1].mT + new @ (V[:, :, 1:2] + 3e-6 * V[:, :, :1]).mT
    if kind == "cancelling":
        G = torch.randn(batch, m, 1, dtype=DOUBLE) @ torch.randn(batch, 1, n, dtype=DOUBLE)
        G = 0.1 * G / torch.linalg.matrix_norm(G)[:, None, None] - 0.95 * (U * s[:, None, :]) @ V.mT
    if kind == "badly scaled":
        G = G * torch.logspace(-3, 3, n, dtype=DOUBLE)
    if kind == "much larger":
        G = 1e6 * G
    return U, s, V, G


KINDS = ["random", "decaying", "clustered", "rank deficient", "zero", "inside the momentum", "nearly inside"]
KINDS += ["badly scaled", "much larger", "hinted", "cancelling"]


def solved(U, s, V, G, beta, factor=None, scale=1.0):
    """Return the new factors and the dense beta M + Ghat, in float64, both divided by `scale`."""
    stored = Factors(*(t.float().contiguous().to(DEVICE) for t in (U, s * scale, V)))
    before = real_factors(*stored)
    sketches = [t.float() for t in sketch((G * scale).to(DEVICE), *(before[i].double() for i in (0, 2)))]
    batch = problem("gram", stored, *sketches, beta)
    measure([batch])
    after = batch.solve(factor, torch.ones(len(U), dtype=torch.bool, device=DEVICE))
    U, s, V, GV, GtU = (t.double().cpu() for t in (*before, *sketches))
    f = 1.0 if factor is None else factor.cpu()
    C = U.mT @ (GV / scale)
    moment = (U * (beta * s / scale)[:, None, :]) @ V.mT
    K = moment + f * (U @ (GtU / scale).mT + (GV / scale) @ V.mT - U @ C @ V.mT)
    new = Factors(*(t.double().cpu() for t in after))
    return new._replace(s=new.s / scale), K, batch


def check(after, K, rank):
    """Hold the budget of `mofasgd.algebra`."""
    U, s, V = after
    exact = torch.linalg.svdvals(K)
    assert all(t.isfinite().all() for t in after)
    eye = torch.eye(rank, dtype=DOUBLE)
    assert (U.mT @ U - eye).abs().max() <= 1e-5
    assert (V.mT @ V - eye).abs().max() <= 1e-5
    error = torch.linalg.matrix_norm(K - (U * s[:, None, :]) @ V.mT)
    best = exact[:, rank:].norm(dim=-1)
    assert (error <= 1.02 * best + 1e-5 * exact.norm(dim=-1)).all()
    assert (s[:, :-1] >= s[:, 1:]).all()
    # The step's singular values by rank of K's: 1 for real directions, 0 for noise.
    step = torch.linalg.svdvals((U * moving(s).double()[:, None, :]) @ V.mT)[:, :rank]
    real, noise = exact[:, :rank] > 1e-4 * exact[:, :1], exact[:, :rank] < 1e-6 * exact[:, :1]
    assert ((step - 1).abs() <= 1e-3)[real].all()
    assert (step <= 1e-3)[noise].all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_keeps_its_budget_on_every_spectrum(kind, size):
    m, n, rank = size
    after, K, batch = solved(*case(kind, m, n, rank), 0.95)
    check(after, K, rank)
    projected = K - 0.95 * (real_factors(*batch.stored).U.double() * batch.stored.s[:, None, :].double()).cpu() @ (
        real_factors(*batch.stored).V.double().cpu().mT
    )
    norm = torch.linalg.matrix_norm(projected)
    assert torch.allclose(batch.square_norms.cpu().sqrt(), norm, rtol=1e-5, atol=1e-6 * float(norm.max()) + 1e-12)
    assert (batch.moves.cpu() == (kind != "zero")).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("kind", ["random", "rank deficient"])
def test_whole_matrices_may_be_tiny_or_huge(kind, scale):
    after, K, _ = solved(*case(kind, 60, 50, 4), 0.95, scale=scale)
    check(after, K, 4)


@pytest.mark.parametrize("kind", ["random", "much larger", "nearly inside"])
def test_subspace_iteration_keeps_the_budget_too(kind, monkeypatch):
    monkeypatch.setitem(algebra._DIRECT, DEVICE.type, 16)
    for rank in (16, 32):
        after, K, _ = solved(*case(kind, 150, 120, rank), 0.95)
        check(after, K, rank)


def check_close(distance, directions, rank):
    """Hold more than the budget where all but a small part of the gradient, in so many directions, is old."""
    U, s, V, _ = case("random", 60, 50, rank)
    own = torch.arange(rank) < (rank // 2 if directions == 1 else rank)
    s, core = torch.where(own, s, 1e-9), torch.randn(3, rank, rank, dtype=DOUBLE) * own * own[:, None]
    new = torch.randn(3, 60, directions, dtype=DOUBLE) @ torch.randn(3, directions, 50, dtype=DOUBLE)
    G = U @ core @ V.mT + distance * new / math.sqrt(directions)
    (U, s, V), K, _ = solved(U, s, V, G, 0.5)
    eye, exact = torch.eye(rank, dtype=DOUBLE), torch.linalg.svdvals(K)
    assert max((U.mT @ U - eye).abs().max(), (V.mT @ V - eye).abs().max()) <= 2e-7
    error = torch.linalg.matrix_norm(K - (U * s[:, None, :]) @ V.mT)
    assert (error <= 1.02 * exact[:, rank:].norm(dim=-1) + 5e-6 * exact.norm(dim=-1)).all()


@pytest.mark.parametrize("directions", [1, 50])
@pytest.mark.parametrize("distance", [3e-6, 6e-6])
def test_what_is_close_to_the_momentum_is_neither_lost_nor_skewed(distance, directions):
    check_close(distance, directions, 8)


@pytest.mark.parametrize("decades", [5, 7])
def test_subspace_iteration_loses_no_small_direction_of_the_momentum(decades, monkeypatch):
    monkeypatch.setitem(algebra._DIRECT, DEVICE.type, 16)
    U, _, V, G = case("zero", 80, 70, 33)
    s = torch.logspace(0, -decades, 33, dtype=DOUBLE).expand(3, 33)
    (U, s, V), K, _ = solved(U, s, V, G, 0.95)
    assert (torch.linalg.matrix_norm(K - (U * s[:, None, :]) @ V.mT) <= 1e-6 * torch.linalg.matrix_norm(K)).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="all tests run the kernels there")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton")
def test_a_gpu_polishes_too(monkeypatch):
    pytest.importorskip("triton")
    for module in (algebra, columns):
        monkeypatch.setattr(module, "usable", lambda device: True)
    check_close(6e-6, 1, 6)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="all tests run the kernels there")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton")
@pytest.mark.parametrize("direct", [4, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpus_way_keeps_the_budget(kind, direct, monkeypatch):
    pytest.importorskip("triton")
    for module in (algebra, columns):
        monkeypatch.setattr(module, "usable", lambda device: True)
    monkeypatch.setitem(algebra._DIRECT, "cpu", direct)
    after, K, _ = solved(*case(kind, 60, 50, 6, batch=2), 0.95)
    check(after, K, 6)


@pytest.mark.parametrize("rows", [4096, 4098, 4099])
def test_products_of_tall_matrices_are_the_same_by_strips(rows):
    A, B = (torch.randn(2, rows, k, dtype=DOUBLE, device=DEVICE) for k in (5, 3))
    assert torch.allclose(columns.tall_product(A, B[:1].expand_as(B)), A.mT @ B[:1], rtol=1e-10, atol=1e-10)


def test_a_factor_scales_the_gradient_and_beta_may_be_a_tensor():
    U, s, V, G = case("random", 60, 50, 4)
    plain, _, _ = solved(U, s, V, 0.25 * G, 0.9)
    factor = torch.tensor(0.25, dtype=DOUBLE, device=DEVICE)
    scaled, K, _ = solved(U, s, V, G, 0.9, factor)
    check(scaled, K, 4)
    assert (plain.s - scaled.s).abs().max() <= 1e-6
    beta = torch.tensor(0.9, device=DEVICE)
    stored = Factors(*(t.float().to(DEVICE) for t in (U, s, V)))
    batch = problem("gram", stored, *sketch(0.25 * G.float().to(DEVICE), stored.U, stored.V), beta)
    measure([batch])
    tensor = batch.solve(None, torch.ones(3, dtype=torch.bool, device=DEVICE))
    assert (plain.s - tensor.s.double().cpu()).abs().max() <= 1e-6


def test_what_a_cancelled_momentum_leaves_is_no_direction():
    U, s, V, _ = (t.float().double() for t in case("random", 60, 50, 4))
    after, _, _ = solved(U, s, V, -0.5 * (U * s[:, None, :]) @ V.mT, 0.5)
    assert not after.s.any()


def test_a_matrix_that_is_not_finite_leaves_its_neighbours_alone():
    U, s, V, G = case("random", 60, 50, 4)
    alone, _, _ = solved(U[1:], s[1:], V[1:], G[1:], 0.9)
    G[0, 3, 5] = math.nan
    found, _, batch = solved(U, s, V, G, 0.9)
    assert batch.finite.tolist() == [False, True, True]
    assert all(torch.equal(a[1:], b) for a, b in zip(found, alone, strict=True)) or torch.allclose(found.s[1:], alone.s)


@pytest.mark.parametrize("kind", ["random", "rank deficient", "decaying", "zero"])
@pytest.mark.parametrize("rank", [4] + ([32, 128] if DEVICE.type == "cuda" else []))
def test_the_start_by_gram_matrices_is_that_of_the_reference(kind, rank):
    m, n = 20 * rank, 17 * rank
    G = case(kind, m, n, rank, 2)[3].float().to(DEVICE)
    firsts = [FirstWindow(0, i, MatrixShape((), m, n), rank, torch.float32) for i in range(2)]
    assert not firsts[0].dense
    observed = [torch.cat(p) for p in zip(*(f.observe(G[i : i + 1]) for i, f in enumerate(firsts)), strict=True)]
    eye = torch.eye(rank, dtype=DOUBLE, device=DEVICE)
    errors = {}
    for solver in ("svd", "gram"):
        U, s, V = (t.double() for t in first_factors(solver, firsts, list(observed)))
        assert (U.mT @ U - eye).abs().max() <= 1e-5
        assert (V.mT @ V - eye).abs().max() <= 1e-5
        errors[solver] = torch.linalg.matrix_norm(G.double() - (U * s[:, None, :]) @ V.mT)
    size = torch.linalg.matrix_norm(G.double())
    assert (errors["gram"] <= 1.02 * errors["svd"] + 1e-5 * size).all()


@pytest.mark.parametrize(
    ("shape", "rank"), [((32, 256), 32), ((64, 256), 48), ((60, 50), 50), ((16, 40), 16), ((5, 4, 6), 4)]
)
def test_hard_gradients_leave_the_factors_orthonormal(shape, rank):
    W = torch.nn.Parameter(torch.randn(shape, device=DEVICE))
    opt = MoFaSGD([W], lr=0.01, rank=rank)
    eye = torch.eye(rank, device=DEVICE)
    for i in range(120):
        G = torch.ones(shape) if i % 7 == 6 else torch.as_tensor(kinds_of_gradient(shape, i)).float()
        W.grad = G.to(DEVICE)
        opt.step()
        for Q in opt.factors(W)[::2]:
            assert (Q.mT @ Q - eye).abs().max() <= 1e-5


def test_equal_singular_values_do_not_rise_by_rounding():
    # float64 shows the last digit of what the algebra has found; of a start, and of later steps.
    W = torch.nn.Parameter(torch.zeros(8, 120, 100, device=DEVICE, dtype=DOUBLE))
    opt = MoFaSGD([W], lr=0.01, rank=6, solver="gram", state_dtype=DOUBLE)
    G = frame(8, 120, 6) @ frame(8, 100, 6).mT / 3
    for total in (1.0, 1.95, 2.8525):
        W.grad = G.to(DEVICE)
        opt.step()
        s = opt.factors(W).s
        assert (s - total / 3).abs().max() <= 1e-6
        assert (s[:, :-1] >= s[:, 1:]).all()


@pytest.mark.parametrize("kind", ["random", "nearly inside"])
@pytest.mark.parametrize("solver", ["svd", "gram"])
def test_what_the_complement_leaves_out_is_spanned_by_orthonormal_columns(solver, kind):
    # "nearly inside": of the sketches little is left outside the factors' spaces, still more than rounding.
    U, s, V, G = (t.float().to(DEVICE) for t in case(kind, 60, 50, 4))
    sketches = sketch(G, U, V)
    batch = problem(solver, Factors(U, s, V), *sketches, 0.9)
    measure([batch])
    spaces = batch.spaces(torch.linalg.matrix_norm(G.double()))
    eye = torch.eye(8, device=DEVICE)
    for Q, old, new in zip(spaces, (U, V), sketches, strict=True):
        assert (Q.mT @ Q - eye).abs().max() <= 1e-5
        for part in (old, new):
            assert (
                torch.linalg.matrix_norm(part - Q @ (Q.mT @ part)).max() <= 1e-5 * torch.linalg.matrix_norm(part).max()
            )


@pytest.mark.parametrize("seed", range(4))
def test_two_samples_of_disjoint_features_keep_the_direction_of_a_new_label(seed):
    # With columns of the sketch in order, half of such cases lost up to 0.4 of the momentum.
    torch.manual_seed(seed)
    x, old = torch.zeros(2, 50), torch.randn(2, 60)
    x[0, :25], x[1, 25:] = torch.randn(2, 25)
    old[1] -= old[0] * (old[1] @ old[0]) / (old[0] @ old[0])
    new, found = torch.stack([old[0], torch.randn(60)]), {}
    for solver in ("svd", "auto"):
        W = torch.nn.Parameter(torch.zeros(60, 50))
        opt = MoFaSGD([W], lr=1e-3, rank=4, solver=solver)
        for label in (old, new):
            ((x @ W.T - label) ** 2).sum().backward()
            opt.step()
            opt.zero_grad()
        found[solver] = opt.momentum(W)
    assert (found["auto"] - found["svd"]).norm() <= 1e-5 * found["svd"].norm()


@pytest.mark.parametrize(("shape", "rank"), [((256, 256), 32), ((128, 512), 128)])
def test_constant_gradients_between_random_ones_keep_the_factors_orthonormal(shape, rank):
    # All columns of the sketches are parallel.
    W = torch.nn.Parameter(torch.randn(shape, device=DEVICE))
    opt = MoFaSGD([W], lr=0.01, rank=rank)
    for i in range(6):
        W.grad = torch.ones(shape, device=DEVICE) + (i % 2) * torch.randn(shape, device=DEVICE)
        opt.step()
        # The start of a matrix of this size is LAPACK's SVD of G, which float32 leaves 2e-5 short.
        for Q in opt.factors(W)[::2] if i else ():
            assert (Q.mT @ Q - torch.eye(rank, device=DEVICE)).abs().max() <= 1e-5
