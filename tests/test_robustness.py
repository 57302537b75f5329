"""The rules of `MoFaSGD.step` for the gradients of real training: none, zero, rank-deficient, huge, not finite."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from reference import tangent, truncate
from torch import nn

from mofasgd import MoFaSGD

SHAPES = [(60, 50), (9, 7), (3, 40), (6, 6), (1, 20), (20, 1), (5, 4, 6)]


def weight(shape, dtype=torch.float32, seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def step(opt, W, G):
    """Take a step with G; return how the weight moved."""
    before = W.detach().clone()
    W.grad = None if G is None else torch.as_tensor(G).to(W.dtype)
    opt.step()
    return W.detach() - before


def snapshot(opt, *params):
    return [{k: v.clone() for k, v in opt.state[p].items()} for p in params]


def unchanged(opt, saved, *params):
    return all(torch.equal(opt.state[p][k], v) for p, s in zip(params, saved, strict=True) for k, v in s.items())


def assert_sound(opt, W):
    assert W.isfinite().all()
    U, s, V = opt.factors(W)
    assert s.isfinite().all()
    for Q in (U, V):
        eye = torch.eye(Q.shape[-1])
        assert (Q.mT @ Q - eye).abs().max() <= 1e-5


def kinds_of_gradient(shape, i):
    """One gradient of each hard kind in turn, of sizes from 1e-30 to 1e30."""
    rng = np.random.default_rng(i)
    G = rng.standard_normal(shape)
    kind = i % 10
    if kind == 1:
        G = np.zeros(shape)
    elif kind == 2:
        G = np.full(shape, 3.0)
    elif kind == 3:
        G = rng.standard_normal((*shape[:-1], 1)) @ rng.standard_normal((*shape[:-2], 1, shape[-1]))
    elif kind == 4:
        G = np.where(rng.random(shape) < 0.05, G, 0.0)
    elif kind == 5:
        G[..., 0, 0] = [np.inf, -np.inf, np.nan][i % 3]
    elif kind == 6:
        G *= 1e-30
    elif kind == 7:
        G *= 1e30
    elif kind == 8:
        G *= 10.0 ** rng.uniform(-6, 6, shape)
    return G


@pytest.mark.parametrize(("shape", "rank"), [*((shape, 4) for shape in SHAPES), ((60, 50), 1), ((60, 50), 40)])
@pytest.mark.parametrize("complement", [0.0, 2.0])
def test_many_hard_steps_leave_no_nan_and_orthonormal_factors(shape, rank, complement):
    W = weight(shape)
    with pytest.warns(UserWarning, match="lowered") if min(shape[-2:]) < rank else nullcontext():
        opt = MoFaSGD([W], lr=0.01, rank=rank, complement=complement, lr_scale="match_rms_adamw", max_grad_norm=1e3)
    steps = 1000 if rank < 40 else 400
    for i in range(steps):
        step(opt, W, kinds_of_gradient(shape, i))
        if i % 50 < 10:
            assert_sound(opt, W)
    assert opt.nonfinite_steps == steps // 10


@pytest.mark.parametrize("shape", [(60, 50), (9, 7)])
def test_zero_or_missing_gradients_move_nothing_and_leave_the_start_pending(shape):
    W, fresh = weight(shape), weight(shape)
    opt, twin = (MoFaSGD([p], rank=3, weight_decay=0.5, complement=1.0) for p in (W, fresh))
    for G in (None, np.zeros(shape)):
        assert not step(opt, W, G).any()
        assert not opt.factors(W).s.any()
        assert opt.grad_norm() == 0
    G = np.random.default_rng(0).standard_normal(shape)
    assert torch.equal(step(opt, W, G), step(twin, fresh, G))
    saved = snapshot(opt, W)
    for G in (None, np.zeros(shape)):
        assert not step(opt, W, G).any()
        assert unchanged(opt, saved, W)


def test_zero_slices_of_a_stack_stay_pending_and_still_on_their_own():
    rng = np.random.default_rng(0)
    W, single = weight((3, 60, 50)), None
    opt = MoFaSGD([W], rank=3, weight_decay=0.5)
    G = rng.standard_normal((3, 60, 50))
    G[1] = 0
    single = nn.Parameter(W.detach()[1].clone())
    moved = step(opt, W, G)
    assert [bool(m.any()) for m in moved] == [True, False, True]
    assert opt.state[W]["initialized"].tolist() == [True, False, True]
    kept = opt.factors(W)
    G = rng.standard_normal((3, 60, 50))
    G[2] = 0
    moved = step(opt, W, G)
    assert [bool(m.any()) for m in moved] == [True, True, False]
    assert torch.equal(opt.factors(W).U[2], kept.U[2])
    assert not torch.equal(opt.factors(W).U[0], kept.U[0])
    # The late slice started from its own first gradient, as a matrix of its own would.
    twin = MoFaSGD([single], rank=3, weight_decay=0.5)
    assert (step(twin, single, G[1]) - moved[1]).abs().max() <= 1e-6


@pytest.mark.parametrize("q", [1, 2, 5])
@pytest.mark.parametrize("shape", [(80, 60), (12, 30)])
def test_a_gradient_of_rank_q_below_r_moves_the_weight_in_its_space_only(q, shape):
    rng = np.random.default_rng(q)
    m, n = shape
    left, right = np.linalg.qr(rng.standard_normal((m, q)))[0], np.linalg.qr(rng.standard_normal((n, q)))[0]
    W = weight(shape)
    opt = MoFaSGD([W], lr=1.0, rank=8, complement=1.0, lr_scale="none")
    for i in range(8):
        D = step(opt, W, left @ rng.standard_normal((q, q)) @ right.T * 10.0 ** (i - 4)).double().numpy()
        assert np.abs(D - left @ (left.T @ D)).max() <= 1e-5
        assert np.abs(D - (D @ right) @ right.T).max() <= 1e-5
        assert np.linalg.norm(D) == pytest.approx(q**0.5, rel=1e-4)


def test_a_gradient_inside_the_current_subspace_keeps_the_subspace():
    W = weight((70, 50))
    opt = MoFaSGD([W], rank=3)
    step(opt, W, np.random.default_rng(0).standard_normal((70, 50)))
    U, s, V = opt.factors(W)
    step(opt, W, (U * torch.tensor([3.0, 2.0, 1.0])) @ V.mT)
    after = opt.factors(W)
    assert (after.U - U @ (U.mT @ after.U)).abs().max() <= 1e-5
    assert torch.allclose(after.s, 0.95 * s + torch.tensor([3.0, 2.0, 1.0]), rtol=1e-5)


@pytest.mark.parametrize("shape", [(80, 60), (9, 7)])
@pytest.mark.parametrize("complement", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_step_does_not_see_the_scale_of_the_gradient(shape, complement, scale):
    plain, scaled = weight(shape), weight(shape)
    opts = [MoFaSGD([p], lr=1.0, rank=4, complement=complement) for p in (plain, scaled)]
    rng = np.random.default_rng(0)
    for _ in range(4):
        G = rng.standard_normal(shape)
        # float32 products of other numbers round otherwise; 1e-4 covers how four updates amplify that.
        assert (step(opts[0], plain, G) - step(opts[1], scaled, scale * G)).abs().max() <= 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("when", [0, 2])
def test_a_parameter_with_a_non_finite_gradient_is_left_as_it_was_and_counted(value, when):
    rng = np.random.default_rng(0)
    params = [weight((60, 50)), weight((60, 50)), weight((50,)), weight((50,))]
    groups = [{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}]
    opt = MoFaSGD(groups, rank=3, weight_decay=0.1, max_grad_norm=1.0, complement=1.0)
    for i in range(4):
        for p in params:
            p.grad = torch.from_numpy(rng.standard_normal(p.shape)).float()
        if i == when:
            opt.materialize()
            saved, weights = snapshot(opt, *params), [p.detach().clone() for p in params]
            params[0].grad[3, 4] = params[2].grad[7] = value
        opt.step()
        if i == when:
            assert unchanged(opt, saved[::2], *params[::2])
            assert not unchanged(opt, saved[1::2], *params[1::2])
            assert [torch.equal(p, w) for p, w in zip(params, weights, strict=True)] == [True, False, True, False]
            norm = opt.grad_norm()
    assert opt.nonfinite_steps == 1
    assert norm.isfinite()
    assert all(p.isfinite().all() for p in params)
    # The skipped parameters are not in the norm: it is that of the other two.
    assert norm <= torch.hypot(params[1].grad.norm(), params[3].grad.norm()) * 1.5


@pytest.mark.parametrize("shape", [(9, 7), (60, 50)])
def test_reduced_precision_settings_and_autocast_change_no_bit(shape):
    def train():
        W, b = weight(shape), weight((30,))
        opt = MoFaSGD([{"params": [W]}, {"params": [b], "algorithm": "adamw"}], rank=3, complement=1.0)
        rng = np.random.default_rng(0)
        for _ in range(5):
            b.grad = torch.from_numpy(rng.standard_normal(30)).float()
            step(opt, W, rng.standard_normal(shape))
        return W, b, *opt.factors(W)

    expected = train()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = train()
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_dead_units_stay_where_they_are_under_the_complement():
    # Rows whose gradient is exactly zero hold nothing but the rounding of the projections.
    W = weight((60, 50))
    opt = MoFaSGD([W], lr=1.0, rank=8, complement=1.0, lr_scale="none")
    rng = np.random.default_rng(0)
    for i in range(20):
        G = rng.standard_normal((60, 50)) * 10.0 ** rng.uniform(-2, 2, (60, 1))
        G[:10] = 0
        moved = step(opt, W, G)
        assert moved[:10].abs().max() <= 1e-5
        # All others, of row lengths four decades apart, move by the same: E's rows are as long as each other.
        if i > 0:
            assert moved[10:].norm(dim=1).min() >= 0.5


@pytest.mark.parametrize("shape", [(60, 50), (9, 7)])
def test_rank_one_gradients_in_new_directions_move_their_span_only_whatever_their_scale(shape):
    # Columns beyond the rank of M are rounding noise: the tangent space must not see them.
    rng = np.random.default_rng(0)
    plain, scaled = weight(shape), weight(shape)
    opts = [MoFaSGD([p], lr=1.0, rank=5, lr_scale="none") for p in (plain, scaled)]
    left, right = rng.standard_normal((shape[0], 4)), rng.standard_normal((shape[1], 4))
    for i in range(4):
        G = np.outer(left[:, i], right[:, i])
        U, sizes, Vh = np.linalg.svd(opts[0].momentum(plain).double().numpy())
        U, V = U[:, : (sizes > 1e-5 * sizes[0]).sum()], Vh[: (sizes > 1e-5 * sizes[0]).sum()].T
        one, two = step(opts[0], plain, G), step(opts[1], scaled, 3e25 * G)
        norm = np.linalg.norm(tangent(G, U, V) if i else G)
        assert opts[0].grad_norm().item() == pytest.approx(norm, rel=1e-4)
        Q, P = np.linalg.qr(left[:, : i + 1])[0], np.linalg.qr(right[:, : i + 1])[0]
        D = one.double().numpy()
        assert np.abs(D - Q @ (Q.T @ D)).max() <= 1e-5
        assert np.abs(D - (D @ P) @ P.T).max() <= 1e-5
        assert (one - two).abs().max() <= 1e-4
        assert_sound(opts[0], plain)


def test_a_momentum_of_exactly_zero_is_not_dead():
    W = weight((1, 1))
    with pytest.warns(UserWarning, match="lowered"):
        opt = MoFaSGD([W], lr=0.1, rank=2, beta=0.5)
    for G, moves in ((1.0, True), (-0.5, False), (1.0, True)):
        assert bool(step(opt, W, [[G]]).any()) is moves


@pytest.mark.parametrize("shape", [(9, 7), (60, 50)])
@pytest.mark.parametrize("size", [1e36, 1e37, 1e38])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_finite_gradients_whose_momentum_overflows_are_clipped_or_skipped_and_counted(shape, size, max_grad_norm):
    W = weight(shape)
    opt = MoFaSGD([W], rank=3, max_grad_norm=max_grad_norm, complement=1.0)
    for _ in range(30):
        moved = step(opt, W, np.full(shape, size))
        assert W.isfinite().all()
        if opt.state[W]["initialized"]:
            assert_sound(opt, W)
    # 30 steps of beta 0.95 add up to 15.7 gradients, unless they are clipped; the sketches hold one.
    size *= np.prod(shape) ** 0.5 * (15.7 if max_grad_norm is None else 1.0)
    if size < 1e38:
        assert opt.nonfinite_steps == 0
        assert moved.any()
    if size > 1e39:
        assert opt.nonfinite_steps > 0


@pytest.mark.parametrize("solver", ["svd", "gram"])
@pytest.mark.parametrize("exponent", [-39, -30, 30])
def test_clipping_and_norms_hold_over_the_whole_range_of_float32(exponent, solver):
    # Squares of these are outside float32: norms are summed in float64. 1e-39 is subnormal.
    results = []
    for scale in (1.0, 10.0**exponent):
        params = [weight((9, 7)), weight((7,))]
        groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw", "eps": 0.0}]
        opt = MoFaSGD(groups, lr=0.1, rank=3, max_grad_norm=scale, solver=solver)
        rng = np.random.default_rng(0)
        for _ in range(3):
            for p in params:
                p.grad = torch.from_numpy(scale * rng.standard_normal(p.shape)).float()
            opt.step()
        results.append((params[0].detach(), opt.momentum(params[0]) / scale, opt.grad_norm() / scale))
    # A subnormal number has 17 bits here.
    tolerance = 1e-3 if exponent == -39 else 1e-5
    assert all((a - b).abs().max() <= tolerance for a, b in zip(*results, strict=True))


def test_a_nan_in_one_slice_skips_the_stack_and_a_nan_in_a_vector_is_counted():
    W, b = weight((3, 9, 7)), weight((7,))
    opt = MoFaSGD([{"params": [W]}, {"params": [b], "algorithm": "adamw", "eps": 0.0}], rank=3)
    rng = np.random.default_rng(0)
    for i in range(4):
        b.grad = torch.from_numpy(rng.standard_normal(7)).float()
        G = rng.standard_normal((3, 9, 7))
        if i in (0, 2):
            G[1, 2, 3] = np.nan
        if i == 3:
            b.grad[0] = float("inf")
            kept = b.detach().clone()
        moved = step(opt, W, G)
        assert bool(moved.any()) is (i in (1, 3))
    assert torch.equal(b, kept)
    assert opt.nonfinite_steps == 3


def test_a_large_rank_deficient_start_stays_in_its_space():
    rng = np.random.default_rng(0)
    left, right = np.linalg.qr(rng.standard_normal((400, 20)))[0], np.linalg.qr(rng.standard_normal((300, 20)))[0]
    W = weight((400, 300))
    opt = MoFaSGD([W], lr=1.0, rank=32, lr_scale="none")
    for i in range(3):
        D = step(opt, W, left @ rng.standard_normal((20, 20)) @ right.T * 10.0 ** (30 * (i - 1))).double().numpy()
        assert np.abs(D - left @ (left.T @ D)).max() <= 1e-5
        assert np.abs(D - (D @ right) @ right.T).max() <= 1e-5


def test_norms_stay_finite_where_products_of_finite_sketches_do_not():
    # U'GV of W, and the second slice's M_1 of S, are beyond float32 although every sketch is within it; so is the
    # float64 gradient for AdamW's float32 moments.
    rng = np.random.default_rng(0)
    pattern = np.ones((60, 50))
    pattern[0], pattern[1:, :3] = 0, -1
    W, S, b, d = params = [weight((60, 50)), weight((2, 9, 7)), weight((7,)), weight((5,), torch.float64)]
    groups = [{"params": [W, S]}, {"params": [b, d], "algorithm": "adamw"}]
    opt = MoFaSGD(groups, rank=3, complement=1.0, max_grad_norm=1.0)
    for i in range(3):
        stack = rng.standard_normal((2, 9, 7))
        stack[1] *= (0.0, 1e38, 1.0)[i]
        W.grad = torch.from_numpy(pattern * (1.0 if i == 0 else 3e37)).float()
        S.grad = torch.from_numpy(stack).float()
        b.grad = torch.from_numpy(rng.standard_normal(7)).float()
        d.grad = torch.full((5,), 1.0 if i == 0 else 1e39, dtype=torch.float64)
        opt.step()
        if i > 0:
            # W's gradient is of rank 1 and its own tangent part; S's second slice starts in step 1.
            start = np.linalg.norm(truncate(stack[1], 3)) if i == 1 else 0.0
            assert opt.grad_norm().item() == pytest.approx(np.hypot(3e37 * (59 * 50) ** 0.5, start), rel=1e-5)
        assert all(p.isfinite().all() for p in params)
    assert opt.nonfinite_steps == 2


@pytest.mark.parametrize("size", [2e38, 1e-30])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_the_complement_of_the_first_window_holds_at_any_size(size, max_grad_norm):
    W, twin = weight((9, 7)), weight((9, 7))
    G = np.random.default_rng(0).standard_normal((9, 7)).clip(-1, 1)
    moved = step(MoFaSGD([W], rank=3, complement=1.0, max_grad_norm=max_grad_norm), W, size * G)
    expected = step(MoFaSGD([twin], rank=3, complement=1.0), twin, G)
    if size > 1 and max_grad_norm is None:
        assert not moved.any()  # M_1 is beyond float32: skipped
    else:
        assert (moved - expected).abs().max() <= 1e-6


def test_the_complement_of_a_gradient_orthogonal_to_the_momentum_is_not_decided_by_rounding():
    t = {"dtype": torch.float64}
    Q, P = torch.linalg.qr(torch.randn(60, 60, **t))[0], torch.linalg.qr(torch.randn(50, 50, **t))[0]
    first = Q[:, :8] @ torch.randn(8, 8, **t) @ P[:, :8].T
    second = Q[:, 8:] @ torch.randn(52, 42, **t) @ P[:, 8:].T
    moves = []
    for dtype in (torch.float64, torch.float32):
        W = nn.Parameter(torch.zeros(60, 50, dtype=dtype))
        opt = MoFaSGD([W], rank=8, lr=1.0, lr_scale="none", complement=1.0, state_dtype=dtype)
        step(opt, W, first)
        moves.append(step(opt, W, second).double())
    assert (moves[0] - moves[1]).norm() <= 1e-4 * moves[0].norm()
