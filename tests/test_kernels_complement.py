"""The complement's kernels against `normalized_complement` and `apply_update`, on the CPU in Triton's interpreter."""

import math

import pytest
import torch

pytest.importorskip("triton")

from mofasgd.apply import Rounding, apply_update
from mofasgd.complement import normalized_complement, seen_spaces
from mofasgd.kernels.complement import Tiles, apply_complement, row_squares
from mofasgd.kernels.project import sketch_list
from mofasgd.momentum import sketch
from mofasgd.residual import complement_square_norm, residual_factors, row_scales
from mofasgd.rng import ROUNDING, key_of, key_tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Of the length of a row of E: the median and the largest. float32: three TF32 products, or float32 ones, round by 1e-6
# of |G_i| at most, of which rows here keep 3 % or more. bfloat16: 3e-4 of what is taken away from a row and 5e-4 of
# what is left of an average row (`mofasgd.residual`), twice that where the spaces are half of all; some rows here are a
# tenth of the average.
TOLERANCE = {torch.float32: (1e-5, 5e-5), torch.bfloat16: (4e-3, 1.5e-2)}


def orthonormal(batch, rows, rank):
    return torch.linalg.qr(torch.randn(batch, rows, rank, dtype=torch.float64))[0].float()


def spaces(G, rank):
    """Return Q and P (float32) of gradients (B, m, n), for random factors."""
    G = G.double()
    U, V = orthonormal(len(G), G.shape[1], rank), orthonormal(len(G), G.shape[2], rank)
    scale = G.abs().amax(dim=(1, 2), keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    GV, GtU = sketch((G / scale).float(), U, V)
    return seen_spaces(U, V, GV, GtU, torch.linalg.matrix_norm(G / scale))


def split(stack, count):
    """Return `count` contiguous parameters with the matrices of `stack` (B, m, n) in turn."""
    return [part.contiguous().to(DEVICE) for part in stack.chunk(count)]


def expected(Q, P, G, transposed, dtype=torch.float64):
    """Return E (B, m, n) of `dtype`; what is rounding noise depends on it."""
    Q, P, G = Q.to(dtype), P.to(dtype), G.to(dtype)
    return normalized_complement(P, Q, G.mT).mT if transposed else normalized_complement(Q, P, G)


def complement(gradients, Q, P, transposed=False, tiles=None, known=None):
    """Return (E, row scales), E by `apply_complement` into weights of zeros."""
    Q, P = Q.to(DEVICE), P.to(DEVICE)
    residual = residual_factors(gradients, Q, P, known=known)
    scales = row_scales(gradients, residual, transposed=transposed)
    shape = next(g for g in gradients if g is not None).shape
    weights = [torch.zeros(shape, device=DEVICE) for _ in gradients]
    B, rank = len(Q), Q.shape[-1] // 2
    none, right = torch.zeros_like(Q[..., :rank]), P[..., :rank]
    keep, keys, steps = torch.ones(B, device=DEVICE), torch.zeros(len(weights), 2), torch.zeros(len(weights))
    apply_complement(
        weights, gradients, residual, scales, none, right, keep,
        keys.to(DEVICE, torch.int32), steps.to(DEVICE), stochastic=False, transposed=transposed, tiles=tiles,
    )  # fmt: skip
    return -torch.cat(weights).cpu(), scales.cpu()


def gradient(batch, m, n, rank, dtype=torch.float32):
    """Return gradients that are mostly of low rank, with rows and columns of very different lengths."""
    G = torch.randn(batch, m, rank) @ torch.randn(batch, rank, n) + torch.randn(batch, m, n)
    return (G * torch.logspace(-0.5, 0.5, m)[:, None] * torch.logspace(0.5, -0.5, n)).to(dtype)


def assert_rows_close(actual, wanted, dtype, transposed=False):
    dim = 1 if transposed else 2
    length = torch.linalg.vector_norm(wanted, dim=dim)
    error = torch.linalg.vector_norm(actual.double() - wanted, dim=dim)
    assert not error[length == 0].any()
    error = (error / length)[length > 0]
    median, largest = TOLERANCE[dtype]
    assert error.median() <= median
    assert error.max() <= largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("count", "slices", "m", "n", "rank"),
    # Whole tiles last.
    [(1, 1, 70, 50, 4), (2, 1, 64, 131, 3), (2, 2, 33, 48, 8), (1, 1, 150, 90, 20), (1, 1, 128, 256, 8)],
)
def test_complement_equals_the_reference(count, slices, m, n, rank, transposed, dtype):
    G = gradient(count * slices, m, n, rank, dtype)
    Q, P = spaces(G, rank)
    wanted = expected(Q, P, G, transposed)
    E, scales = complement(split(G, count), Q, P, transposed)
    assert_rows_close(E, wanted, dtype, transposed)
    torch.testing.assert_close(complement_square_norm(scales), torch.ones(count * slices))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_sketches_that_are_known_need_not_be_made_again(transposed, dtype):
    m, n, rank = 70, 50, 6
    G = gradient(2, m, n, rank, dtype)
    U, V = orthonormal(2, m, rank), orthonormal(2, n, rank)
    # The last columns of some factors complete them: the step has sketched by them, and the complement sees none.
    real = torch.arange(rank) < torch.tensor([[4], [6]])
    seen = U * real[:, None], V * real[:, None]
    Q, P = seen_spaces(*seen, *sketch(G.float(), *seen), torch.linalg.matrix_norm(G.double()))
    wanted = expected(Q, P, G, transposed)
    gradients = split(G, 2)
    Q, P = Q.to(DEVICE), P.to(DEVICE)
    GV, GtU = sketch_list(gradients, U.to(DEVICE), V.to(DEVICE))
    zeros = ~real[:, None].to(DEVICE)
    assert (GV * zeros).any()
    assert (GtU * zeros).any()
    plain = complement(gradients, Q, P, transposed)
    for own in (1.0, 0.0, -1.0):
        known = torch.where(zeros, own * GV, GV), torch.where(zeros, own * GtU, GtU)
        E, scales = complement(gradients, Q, P, transposed, known=known)
        assert_rows_close(E, wanted, dtype, transposed)
        # Not only nearly: there is no place where they count.
        assert torch.equal(scales, plain[1])
        assert torch.equal(E, plain[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_do_not_change_the_result(dtype):
    G = gradient(1, 70, 150, 4, dtype)
    Q, P = spaces(G, 4)
    wanted = expected(Q, P, G, False)
    residual = residual_factors([G.to(DEVICE)], Q.to(DEVICE), P.to(DEVICE))
    squares, terms = row_squares([G.to(DEVICE)], residual, transposed=False)
    # One block of the 16 columns of the factors or the loop over them; one chunk of columns or several.
    for tiles in (Tiles(16, 32, 16, 64, 4, 1), Tiles(32, 64, 64, 256, 4, 2)):
        assert_rows_close(complement([G.to(DEVICE)], Q, P, tiles=tiles)[0], wanted, dtype)
        others, same = row_squares([G.to(DEVICE)], residual, transposed=False, tiles=tiles)
        torch.testing.assert_close(others.sum(dim=1), squares.sum(dim=1), rtol=1e-5, atol=0)
        torch.testing.assert_close(same, terms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_size_of_the_gradient_does_not_matter(size, dtype):
    G = gradient(1, 40, 56, 4)
    Q, P = spaces(G, 4)
    G = (G * size).to(dtype)
    E, _ = complement([G.to(DEVICE)], Q, P)
    # E is that of these very numbers; the spaces need only be near.
    assert_rows_close(E, expected(Q, P, G.double() / size, False), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_inside_the_spaces_is_no_direction(transposed, dtype):
    m, n, rank = 96, 80, 8
    # Integers of rank 3, exact in bfloat16, and zero rows and columns, which the factors remember from other steps.
    low = torch.randint(-3, 4, (m, 3)).float() @ torch.randint(-3, 4, (3, n)).float()
    low[::5], low[:, ::7] = 0, 0
    token = torch.zeros(m, n)
    token[::20] = torch.randn(5, n).bfloat16().float()
    # Few columns or rows: the rounding of Q and P for the sketches does not average out.
    inputs = torch.zeros(m, n)
    inputs[:, ::12] = torch.randn(m, 7).bfloat16().float()
    outputs = torch.zeros(m, n)
    outputs[::12] = torch.randn(8, n).bfloat16().float()
    G = torch.stack([low, token, inputs, outputs, torch.zeros(m, n)]).to(dtype)
    Q, P = spaces(G, rank)
    assert not expected(Q, P, G, transposed, torch.float32).any()
    E, scales = complement(split(G, 5), Q, P, transposed)
    assert not scales.any()
    assert not E.any()
    assert not complement_square_norm(scales).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_without_a_direction_among_others(transposed, dtype):
    m, n, block = 64, 48, 8
    G = gradient(1, m, n, block, dtype)
    # Rows in the first columns, which no other row has: P holds them once it holds these columns, in any basis.
    G[:, : 2 * block], G[..., :block] = 0, 0
    G[:, : 2 * block, :block] = torch.randn(1, 2 * block, block).to(dtype)
    # Besides, they hold a little of another column, half of them too little.
    length = torch.linalg.vector_norm(G[:, : 2 * block].float(), dim=-1)
    G[:, : 2 * block, 20] = (length * torch.tensor([3e-4, 0.05]).repeat(block)).to(dtype)
    G[:, 30], G[..., 40] = 0, 0
    Q, P = spaces(G, block)
    Q[:, : 2 * block], P[:, :block], P[..., block:] = 0, 0, 0
    P[:, :block, block:] = orthonormal(1, block, block)
    Q, P = (torch.linalg.qr(t)[0].contiguous() for t in (Q, P))
    if transposed:
        G, Q, P = G.mT.contiguous(), P, Q
    wanted = expected(Q, P, G, transposed)
    out = ~wanted[0].any(dim=0 if transposed else 1)
    assert torch.equal(out.nonzero()[:, 0], torch.arange(0, 2 * block, 2))
    E, scales = complement(split(G, 1), Q, P, transposed)
    assert torch.equal(scales[0] == 0, out)
    assert_rows_close(E, wanted, dtype, transposed)
    torch.testing.assert_close(
        complement_square_norm(scales), wanted.square().sum(dim=(1, 2)).float(), rtol=1e-6, atol=0
    )


def test_factors_of_a_residual_fit_into_float16():
    # Row 0 of Q is long and the others add up: H is ten times as large as the sketches.
    m, n = 512, 256
    Q, P = torch.full((1, m, 2), m**-0.5), torch.randn(1, n, 2)
    Q[:, 0, 0], Q[..., 1], P[..., 1] = 1, 0, 0
    Q, P = (t / torch.linalg.vector_norm(t, dim=1, keepdim=True).clamp(min=1e-3) for t in (Q, P))
    G = (torch.ones(1, m, 1) * P[..., :1].mT).bfloat16()
    residual = residual_factors(split(G, 1), Q.to(DEVICE), P.to(DEVICE))
    assert residual.left.dtype is torch.float16
    assert residual.left.isfinite().all()
    assert residual.right.isfinite().all()


def test_a_matrix_that_is_not_finite_or_missing_has_no_complement():
    G = gradient(4, 32, 40, 4)
    Q, P = spaces(G, 4)
    wanted = expected(Q, P, G, False)
    G[1, 3, 5], G[2, 0, 0] = math.nan, math.inf
    gradients = [*(g.contiguous()[None].to(DEVICE) for g in G[:3]), None]
    E, scales = complement(gradients, Q, P)
    assert not scales[1:].any()
    assert not E[1:].any()
    assert_rows_close(E[:1], wanted[:1], torch.float32)


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "transposed"), [(72, 32, False), (40, 67, False), (30, 70, True)])
def test_step_equals_apply_update(m, n, dtype, gradient_dtype, transposed):
    count, slices, rank, seed, step = 2, 2, 4, 3, 7
    B = count * slices
    G = gradient(B, m, n, rank, gradient_dtype)
    Q, P = spaces(G, rank)
    W = torch.randn(B, m, n).to(dtype)
    left, right = orthonormal(B, m, rank), orthonormal(B, n, rank)
    rate = torch.tensor([0.05, 0.02, 0.0, 0.03])
    # The third matrix does not move, whatever its gradient.
    coefficients = rate[:, None] * torch.rand(B, rank)
    keep = 1 - 0.1 * rate
    size = math.sqrt(min(m, n))
    extra = (rate * size)[:, None, None] * expected(Q, P, G, transposed)

    wanted = [w.clone() for w in W.chunk(count)]
    for i, weight in enumerate(wanted):
        part = slice(i * slices, (i + 1) * slices)
        rounding = Rounding(True, key_of(seed, ROUNDING, i), torch.tensor(step))
        # Factors of a bfloat16 weight are rounded to it.
        scaled = (left[part] * coefficients[part, None, :]).to(dtype).float()
        apply_update(weight, scaled, right[part].to(dtype).float(), extra[part].float(), keep[part], rounding)

    G[2, 0, 0] = math.nan
    gradients, weights = split(G, count), split(W, count)
    Q, P = Q.to(DEVICE), P.to(DEVICE)
    residual = residual_factors(gradients, Q, P)
    scales = (rate * size)[:, None].to(DEVICE) * row_scales(gradients, residual, transposed=transposed)
    keys = key_tensor([key_of(seed, ROUNDING, i) for i in range(count)], DEVICE)
    steps = torch.full((count,), float(step), device=DEVICE)
    left, right, keep = (t.to(DEVICE) for t in (left * coefficients[:, None, :], right, keep))
    apply_complement(
        weights, gradients, residual, scales, left, right, keep, keys, steps,
        stochastic=True, transposed=transposed,
    )  # fmt: skip
    weights = [w.cpu() for w in weights]
    torch.testing.assert_close(weights[1][0], W[2], rtol=0, atol=0)

    if dtype is torch.float32:
        # An element of the step is as exact as its row: the tolerance of E, and a last place of W.
        for actual, one in zip(weights, wanted, strict=True):
            torch.testing.assert_close(
                actual, one, rtol=2e-7, atol=TOLERANCE[gradient_dtype][1] * extra.abs().max().item()
            )
        return
    # The same random numbers round both: only where a carry is as good as even does the step's error change it, and
    # then by the last place of bfloat16.
    actual, one = torch.stack(weights).float(), torch.stack(wanted).float()
    apart = (actual - one).abs()
    assert (apart <= 2**-7 * one.abs() + TOLERANCE[gradient_dtype][1] * extra.abs().max().item()).all()
    assert (apart > 0).double().mean() < {torch.float32: 0.0005, torch.bfloat16: 0.005}[gradient_dtype]


def test_bfloat16_weights_to_nearest():
    # The interpreter's own casts to bfloat16 truncate, so that one last place is all that can be asked of it.
    G = gradient(1, 32, 48, 4)
    Q, P = (t.to(DEVICE) for t in spaces(G, 4))
    W = torch.randn(1, 32, 48).bfloat16()
    extra = 0.1 * expected(Q.cpu(), P.cpu(), G, False)
    gradients, weights = [G.to(DEVICE)], [W.clone().to(DEVICE)]
    residual = residual_factors(gradients, Q, P)
    scales = 0.1 * row_scales(gradients, residual)
    left, right = torch.zeros_like(Q[..., :4]), P[..., :4]
    keys = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    keep, steps = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    apply_complement(weights, gradients, residual, scales, left, right, keep, keys, steps, stochastic=False)
    wanted = (W.double() - extra).bfloat16()
    apart = (weights[0].cpu().view(torch.int16).int() - wanted.view(torch.int16).int()).abs()
    assert apart.max() <= 1


def test_a_row_beyond_float32_makes_no_nan():
    G = gradient(1, 40, 56, 4)
    Q, P = spaces(G, 4)
    gradients, weights = split(G, 1), split(torch.ones(1, 40, 56), 1)
    residual = residual_factors(gradients, Q.to(DEVICE), P.to(DEVICE))
    residual.left[:, 7] = math.inf
    scales = row_scales(gradients, residual)
    assert scales[0, 7] == 0
    flat = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    left, right, one = (torch.zeros(shape, device=DEVICE) for shape in ((1, 40, 4), (1, 56, 4), (1,)))
    apply_complement(weights, gradients, residual, scales, left, right, one + 1, flat, one, stochastic=False)
    assert (weights[0].cpu().reshape(40, 56)[7] == 1).all()
    assert bool(weights[0].isfinite().all())
