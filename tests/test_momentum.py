"""The mathematics against dense float64 linear algebra."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import bases, polar, tangent, truncate

from mofasgd import momentum
from mofasgd.rng import gaussian

CPU = torch.device("cpu")


def random_factors(rng, m, n, r):
    U, V = np.linalg.qr(rng.standard_normal((m, r)))[0], np.linalg.qr(rng.standard_normal((n, r)))[0]
    return U, np.sort(rng.uniform(0.1, 2.0, r))[::-1].copy(), V


def dense(factors):
    U, s, V = factors
    return ((U * s[..., None, :]) @ V.mT).numpy()


def start(G, rank, seed=0):
    """M_1 of G (m, n) by the two sketches, in the dtype of G."""
    width, height = momentum.init_widths(rank)
    Omega, Psi = gaussian(G.shape[1], width, seed, CPU, G.dtype), gaussian(G.shape[0], height, seed + 1, CPU, G.dtype)
    return momentum.init_factors(*momentum.init_sketch(G, Omega, Psi), Psi, rank)


@settings(max_examples=200, deadline=None)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    r=st.integers(1, 24),
    batch=st.sampled_from([(), (3,), (2, 2)]),
    beta=st.sampled_from([0.0, 0.5, 0.95]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_update_is_the_truncated_svd_of_decayed_momentum_plus_projected_gradient(m, n, r, batch, beta, scale, seed):
    r = min(r, m, n)
    rng = np.random.default_rng(seed)
    cases = [
        (*random_factors(rng, m, n, r), scale * rng.standard_normal((m, n)))
        for _ in range(int(np.prod(batch, dtype=int)))
    ]
    U, s, V, G = (torch.from_numpy(np.stack(x)).reshape(*batch, *x[0].shape) for x in zip(*cases, strict=True))
    GV, GtU = momentum.sketch(G, U, V)
    after = momentum.update_factors(U, s, V, GV, GtU, beta)
    assert torch.all(after.s[..., :-1] >= after.s[..., 1:])
    M = dense(after).reshape(-1, m, n)
    for i, (u, sv, v, g) in enumerate(cases):
        A = beta * (u * sv) @ v.T + tangent(g, u, v)
        spectrum = np.linalg.svd(A, compute_uv=False)
        best = np.linalg.norm(A - truncate(A, r))
        assert np.linalg.norm(A - M[i]) <= best + 1e-10 * spectrum[0]
        if r == min(m, n) or spectrum[r - 1] - spectrum[r] > 1e-3 * spectrum[0]:
            assert np.linalg.norm(M[i] - truncate(A, r)) <= 1e-10 * spectrum[0]


def test_norm_of_the_projected_gradient_comes_from_the_sketches():
    rng = np.random.default_rng(0)
    U, _, V = random_factors(rng, 20, 14, 3)
    G = rng.standard_normal((20, 14))
    tU, tV, tG = map(torch.from_numpy, (U, V, G))
    found = momentum.tangent_square_norm(tU, *momentum.sketch(tG, tU, tV))
    assert found.item() == pytest.approx(np.linalg.norm(tangent(G, U, V)) ** 2, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(40, 90),
    n=st.integers(30, 90),
    r=st.integers(1, 8),
    q=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_start_equals_the_svd_of_a_gradient_of_rank_at_most_r(m, n, r, q, seed):
    width, height = momentum.init_widths(r)
    assume(height <= m and width <= n)
    q = min(q, r)
    G = torch.from_numpy(
        np.random.default_rng(seed).standard_normal((m, q)) @ np.random.default_rng(seed + 1).standard_normal((q, n))
    )
    found = start(G.float(), r)
    assert np.linalg.norm(dense(found) - G.numpy()) <= 1e-5 * np.linalg.norm(G)
    step = momentum.direction(*found).double()
    U, V = map(torch.from_numpy, bases(G.numpy(), q))
    assert (step - U @ (U.T @ step)).abs().max() <= 1e-5
    assert (step - (step @ V) @ V.T).abs().max() <= 1e-5
    assert torch.linalg.matrix_rank(step, atol=0.5) == q


@pytest.mark.parametrize("spectrum", ["flat", "inverse", "geometric"])
@pytest.mark.parametrize("rank", [4, 16])
def test_start_is_within_twice_the_best_rank_r_error(spectrum, rank):
    rng = np.random.default_rng(3)
    m, n = 192, 128
    i = np.arange(n)
    s = {"flat": np.ones(n), "inverse": 1 / (1 + i), "geometric": 0.9**i}[spectrum]
    Q, P = np.linalg.qr(rng.standard_normal((m, n)))[0], np.linalg.qr(rng.standard_normal((n, n)))[0]
    G = (Q * s) @ P.T
    best = np.linalg.norm(G - truncate(G, rank))
    for seed in range(5):
        error = np.linalg.norm(G - dense(start(torch.from_numpy(G), rank, seed)))
        assert error <= 2 * best


def test_direction_has_singular_values_one_on_real_directions_only():
    U, s, V = (torch.from_numpy(x) for x in random_factors(np.random.default_rng(1), 9, 7, 4))
    s = torch.tensor([2.0, 1.0, 3e-5, 1e-5], dtype=torch.float64)
    D = momentum.direction(U, s, V)
    assert np.allclose(np.linalg.svd(D.numpy(), compute_uv=False), [1, 1, 1, 0, 0, 0, 0], atol=1e-12)
    assert np.allclose(D.numpy(), polar(dense((U, s, V)), tol=1e-5 * (1 + 1e-9)), atol=1e-12)
    assert not momentum.direction(U, torch.zeros_like(s), V).any()


@pytest.mark.parametrize("power", [-100, 100])
def test_scaling_momentum_and_gradient_by_a_power_of_two_changes_no_bit(power):
    rng = np.random.default_rng(5)
    U, s, V = (torch.from_numpy(x).float() for x in random_factors(rng, 33, 21, 5))
    G = torch.from_numpy(rng.standard_normal((33, 21))).float()
    one = momentum.update_factors(U, s, V, *momentum.sketch(G, U, V), 0.9)
    G = G * 2.0**power
    two = momentum.update_factors(U, s * 2.0**power, V, *momentum.sketch(G, U, V), 0.9)
    assert torch.equal(one.U, two.U)
    assert torch.equal(one.V, two.V)
    assert torch.equal(one.s * 2.0**power, two.s)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_and_autocast_do_not_reach_the_algebra(precision):
    # On a CPU with AMX "medium" really multiplies in bfloat16; autocast does so on every CPU.
    rng = np.random.default_rng(6)
    U, s, V = (torch.from_numpy(x).float() for x in random_factors(rng, 300, 200, 8))
    G = torch.from_numpy(rng.standard_normal((300, 200))).float()

    def results():
        width, height = momentum.init_widths(8)
        Omega, Psi = gaussian(200, width, 1, CPU, torch.float32), gaussian(300, height, 2, CPU, torch.float32)
        sketches = momentum.sketch(G, U, V)
        after = momentum.update_factors(U, s, V, *sketches, 0.9)
        Y, Z = momentum.init_sketch(G, Omega, Psi)
        return [*sketches, *after, Y, Z, *momentum.init_factors(Y, Z, Psi, 8), momentum.direction(*after)]

    expected = results()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = results()
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_inherited_precision_settings_stay_inherited():
    U, s, V = (torch.from_numpy(x).float() for x in random_factors(np.random.default_rng(6), 9, 8, 2))
    try:
        torch.backends.fp32_precision = "tf32"
        momentum.direction(U, s, V)
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        momentum.direction(U, s, V)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_beta_may_be_a_tensor_of_any_float_dtype():
    U, s, V = (torch.from_numpy(x).float() for x in random_factors(np.random.default_rng(6), 9, 8, 2))
    GV, GtU = momentum.sketch(torch.randn(9, 8), U, V)
    number = momentum.update_factors(U, s, V, GV, GtU, 0.75)
    tensor = momentum.update_factors(U, s, V, GV, GtU, torch.tensor(0.75, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(number, tensor, strict=True))
