"""Triton kernels against the torch functions that they equal: in the interpreter on a CPU, compiled on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mofasgd.apply import Rounding, apply_update
from mofasgd.kernels import pointers
from mofasgd.momentum import sketch
from mofasgd.rng import ROUNDING, gaussian, key_of, key_tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Compiled kernels are also run at sizes of several programs, strips and blocks.
SHAPES = [(150, 71), (96, 130)] + ([(1024, 2048), (4096, 1000)] if DEVICE.type == "cuda" else [])
RANKS = [5, 32] + ([8, 64, 128, 200] if DEVICE.type == "cuda" else [])


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sketches_equal_plain_products_and_a_missing_gradient_counts_as_zeros(dtype, shape, rank):
    from mofasgd.kernels.project import sketch_list

    m, n = shape
    gradients = [normal(2, m, n, dtype=dtype), None, normal(2, m, n, dtype=dtype)]
    U, V = normal(6, m, rank), normal(6, n, rank)
    found = sketch_list(gradients, U, V)
    G = torch.cat([torch.zeros(2, m, n, device=DEVICE) if g is None else g for g in gradients]).double()
    expected = sketch(G, U.to(dtype).double(), V.to(dtype).double())
    for a, b, length in zip(found, expected, (n, m), strict=True):
        # Sums of `length` products of size 1, in float32.
        assert (a - b).abs().max() <= 1e-6 * length


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_move_as_by_the_plain_update(dtype, shape, rank):
    from mofasgd.kernels.apply import apply_factored

    m, n = shape
    weights = [normal(2, m, n, dtype=dtype) for _ in range(2)]
    expected = [w.clone() for w in weights]
    # Both sides round the factors to the dtype of the weight.
    left, right = ((scale * normal(4, size, rank)).to(dtype).float() for size, scale in ((m, 0.01), (n, 1.0)))
    keep = torch.tensor([1.0, 0.9, 0.5, 1.0], device=DEVICE)
    keys, steps = [key_of(3, ROUNDING, i) for i in (4, 9)], torch.tensor([7.0, 1e6], device=DEVICE)
    apply_factored(weights, left, right, keep, key_tensor(keys, DEVICE), steps, stochastic=True)
    for i, weight in enumerate(expected):
        part = slice(2 * i, 2 * i + 2)
        apply_update(weight, left[part], right[part], None, keep[part], Rounding(True, keys[i], steps[i]))
        distance = (weights[i].float() - weight.float()).abs()
        if dtype is torch.float32:
            assert distance.max() <= 1e-6 * rank**0.5
        else:
            # The same random number rounds both; sums in another order cross it here and there, by one last place.
            assert (distance > 0).float().mean() <= 1e-3
            assert (distance <= 2.0**-7 * weight.float().abs() + 1e-6 * rank**0.5).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_of_a_weight_is_rounded_as_in_the_whole(shape):
    from mofasgd.kernels.apply import apply_factored

    m, n = shape
    weight, left, right = normal(m, n, dtype=torch.bfloat16), 0.01 * normal(1, m, 5), normal(1, n, 5)
    whole, rows = weight.clone(), slice(37, m)
    part = weight[rows].clone()
    one = (
        torch.ones(1, device=DEVICE),
        key_tensor([key_of(3, ROUNDING, 4)], DEVICE),
        torch.tensor([7.0], device=DEVICE),
    )
    apply_factored([whole], left, right, *one, stochastic=True)
    apply_factored([part], left[:, rows], right, *one, stochastic=True, offset=37 * n)
    assert torch.equal(part, whole[rows])


def test_weights_are_left_alone_to_the_bit_where_nothing_moves():
    from mofasgd.kernels.apply import apply_factored

    weight = normal(150, 71, dtype=torch.bfloat16)
    before = weight.clone()
    keys, steps = key_tensor([5], DEVICE), torch.ones(1, device=DEVICE)
    zeros = torch.zeros(1, 150, 4, device=DEVICE)
    apply_factored([weight], zeros, normal(1, 71, 4), torch.ones(1, device=DEVICE), keys, steps, stochastic=True)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("m", [150, 96] + ([4096] if DEVICE.type == "cuda" else []))
def test_products_of_tall_matrices_are_those_of_float64(m, rank):
    from mofasgd.kernels.gram import combine, gram

    U, S = normal(3, m, rank), normal(3, m, rank)
    L, W = torch.cat([U, S], dim=-1).double(), normal(3, 2 * rank, rank, dtype=torch.float64)
    found = torch.empty(3, 2 * rank, 2 * rank, dtype=torch.float64, device=DEVICE)
    gram(U, S, found)
    assert (found - L.mT @ L).abs().max() <= 1e-14 * m
    # The result is rounded to float32.
    assert torch.allclose(combine(U, S, W, torch.ones(3, dtype=torch.bool, device=DEVICE)).double(), L @ W, rtol=1e-6)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("m", [150, 96] + ([4096] if DEVICE.type == "cuda" else []))
def test_products_in_place_are_those_beside_and_leave_what_is_not_active(m, rank):
    from mofasgd.kernels.gram import advance, combine

    U, S = normal(3, m, rank), normal(3, m, rank)
    W, scale = normal(3, 2 * rank, rank, dtype=torch.float64), normal(3, rank)
    active = torch.tensor([True, False, True], device=DEVICE)
    # What is not active may hold anything.
    S[1], W[1], scale[1] = torch.nan, torch.nan, torch.inf
    result = combine(U, S, W, torch.ones(3, dtype=torch.bool, device=DEVICE))
    expected = torch.where(active[:, None, None], result, U)
    one, two, three = U.clone(), U.clone(), U.clone()
    left = torch.full((3, m, rank), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    right = torch.full((3, rank, m), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    advance(one, S, W, active)
    advance(two, S, W, active, scale, left)
    advance(three, S, W, active, None, right)
    for found in (one, two, three):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(found[1], U[1])
    assert not left[1].any()
    assert not right[1].any()
    near = {"rtol": 2.0**-7, "atol": 1e-6}
    assert torch.allclose(left[::2].float(), (result * scale[:, None])[::2], **near)
    assert torch.allclose(right[::2].float(), result.mT[::2], **near)


@pytest.mark.parametrize("size", [3, 16, 40] + ([64, 128, 256] if DEVICE.type == "cuda" else []))
def test_rotated_rows_are_orthogonal_and_keep_the_singular_values(size):
    from mofasgd.kernels.jacobi import orthogonal_rows

    A = torch.stack([torch.randn(size, size) for _ in range(4)])
    A[1] *= torch.logspace(0, -6, size)
    A[2, :, size // 2 :] = 0
    A[3] = 0
    if size == 40:
        A = A[:2]  # the interpreter takes seconds for one
    rows = orthogonal_rows(A.clone().to(DEVICE)).cpu().double()
    lengths = rows.norm(dim=-1)
    expected = torch.linalg.svdvals(A.double())
    # A row is turned some ten times by each of the others, and rounds every time.
    scale = expected[:, :1].clamp(min=1)
    assert ((lengths.sort(descending=True).values[:, :size] - expected).abs() / scale).max() <= 1e-6 * size
    # Float32 leaves every row an error of the largest one's rounding, so two meet at an angle by the longer of them.
    longer = torch.maximum(lengths[:, :, None], lengths[:, None, :])
    inner = ((rows @ rows.mT) / (expected[:, :1, None] * longer).clamp(min=1e-30))[:2]
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() <= 1e-6 + 1e-7 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_test_matrices_are_the_same_to_the_bit(dtype):
    from mofasgd.kernels.gaussian import fill_gaussian

    found = torch.empty(2, 370, 11, dtype=dtype, device=DEVICE)
    fill_gaussian(found, key_tensor([5, 9], DEVICE))
    for matrix, key in zip(found.cpu(), (5, 9), strict=True):
        assert torch.equal(matrix, gaussian(370, 11, key, torch.device("cpu"), dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_keep_their_accuracy_at_every_scale(dtype):
    from mofasgd.kernels.norm import norms_of

    matrices = [normal(2, 300, 250).mul_(scale).to(dtype) for scale in (1.0, 1e-30, 1e30)]
    found = norms_of([matrices[0], None, *matrices[1:]], 8)
    expected = [G.double().square().sum(dim=(-2, -1)).sqrt() for G in matrices]
    assert torch.allclose(found, torch.cat([expected[0], torch.zeros_like(expected[0]), *expected[1:]]), rtol=1e-6)


@pytest.mark.parametrize("shape", [(300, 250), (70, 260)])
def test_norms_found_with_the_sketches_keep_their_accuracy_at_every_scale(shape):
    from mofasgd.kernels.norm import norms_of
    from mofasgd.kernels.project import sketch_and_measure, sketch_list

    m, n = shape
    # At 1e-21 some squares vanish in float32 but the sum does not; further out all do, or overflow.
    matrices = [normal(2, m, n).mul_(scale).bfloat16() for scale in (1.0, 1e-21, 1e-12, 1e-30, 1e18, 1e30)]
    gradients = [matrices[0], None, *matrices[1:]]
    gradients[1:2] = [torch.zeros_like(matrices[0]), None]
    U, V = normal(16, m, 20), normal(16, n, 20)
    GV, GtU, squares = sketch_and_measure(gradients, U, V)
    assert all(torch.equal(a, b) for a, b in zip((GV, GtU), sketch_list(gradients, U, V), strict=True))
    expected = torch.cat([torch.zeros(2, m, n, device=DEVICE) if g is None else g for g in gradients]).double()
    assert torch.allclose(norms_of(gradients, 16, squares), torch.linalg.matrix_norm(expected), rtol=1e-5, atol=0)
    for bad in (torch.nan, torch.inf):
        matrices[0][1, 3, 5] = bad
        squares = sketch_and_measure(gradients, U, V)[2]
        assert norms_of(gradients, 16, squares).isfinite().tolist() == [True, False, *[True] * 14]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rank", [32, 64])
def test_no_tile_is_loaded_while_it_is_multiplied(rank, turned):
    # Triton buffers a tile that is also read into registers once too little: results are wrong now and then.
    command = [sys.executable, str(Path(__file__).with_name("compiled_sketches.py")), str(rank), "measure"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command + ["turned"] * turned, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    # The tile and the factor, for either half of the products.
    assert found["buffers"] == [found["stages"]] * 4
    assert found["into registers"] == 0
    assert found["products"] == 3


def test_only_matrices_without_a_norm_are_read_for_it():
    from mofasgd.kernels.norm import norms_of
    from mofasgd.kernels.project import sketch_and_measure

    G = torch.full((5, 300, 250), 2.0, device=DEVICE).bfloat16()
    squares = torch.tensor([9.0, 0.0, 1e-30, torch.inf, torch.nan], dtype=torch.float64, device=DEVICE)
    own = 2 * (300 * 250) ** 0.5
    assert torch.allclose(norms_of([G], 5, squares).cpu(), torch.tensor([3.0, own, own, own, own]).double())
    # Of float32 gradients, and beside wide factors, all are.
    for dtype, rank in ((torch.float32, 8), (torch.bfloat16, 72)):
        assert sketch_and_measure([G.to(dtype)], normal(5, 300, rank), normal(5, 250, rank))[2] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [20, 49, 72, 145, 300])
def test_sketches_of_every_width(rank, dtype):
    from mofasgd.kernels.project import sketch_list

    # Many more tiles each way than are loaded ahead.
    G, U, V = normal(1, 500, 700, dtype=dtype), normal(1, 500, rank), normal(1, 700, rank)
    expected = sketch(G.double(), U.to(dtype).double(), V.to(dtype).double())
    for a, b, length in zip(sketch_list([G], U, V), expected, (700, 500), strict=True):
        assert (a - b).abs().max() <= 1e-6 * length


@pytest.mark.parametrize("shape", [(70, 150), (150, 70), (128, 128)])
def test_sketches_by_panels(shape):
    from mofasgd.kernels.project import Cut, sketch_list

    m, n = shape
    gradients = [normal(2, m, n, dtype=torch.bfloat16), None]
    U, V = normal(4, m, 5), normal(4, n, 20)
    whole = sketch_list(gradients, U, V)
    found = sketch_list(gradients, U, V, cut=Cut(16, 32, 4, 2, 40))
    for a, b in zip(found, whole, strict=True):
        assert (a - b).abs().max() <= 1e-4


@pytest.mark.parametrize("rank", [5, 40])
def test_a_basis_is_extended_in_float64(rank):
    from mofasgd.kernels.factors import extend

    U, S, W = normal(2, 150, rank), normal(2, 150, rank), normal(2, 2 * rank, rank, dtype=torch.float64)
    kept = (torch.arange(rank, device=DEVICE) < rank - 2).double().expand(2, -1)
    expected = torch.cat([U * kept[:, None], torch.cat([U, S], dim=-1).double() @ W], dim=-1)
    # The result is rounded to float32.
    assert torch.allclose(extend(U, S, W, kept).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "width"), [(700, 10), (150, 80)])
def test_products_with_rounded_bases_are_as_good_as_float32(m, width, dtype):
    from mofasgd.kernels.factors import cross

    A, halves = normal(2, m, width), [normal(2, m, width // 2) for _ in range(2)]
    S = torch.cat(halves, dim=-1)
    low = A.to(dtype).double()
    expected = torch.stack([A.double().mT @ low, S.double().mT @ low], dim=1)
    assert (cross(A, halves, dtype) - expected).abs().max() <= 1e-6 * m**0.5 * 10
    assert (cross(A, None, dtype) - expected[:, :1]).abs().max() <= 1e-6 * m**0.5 * 10


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [10, 80])
def test_factors_are_joined_and_measured(width, dtype, left):
    from mofasgd.kernels.factors import join

    A, halves = normal(3, 150, width), [normal(3, 150, width // 2) for _ in range(2)]
    W = normal(3, (1 + left) * width, width)
    inverse = torch.tensor([1.0, 0.0, 2.0], device=DEVICE)
    A[1, 3, 2] = torch.nan
    halves[0][1, 5, 1] = torch.inf
    S = torch.cat(halves, dim=-1)
    product = S.double() @ W[:, :width].double() + (A.double() @ W[:, width:].double() if left else 0)
    expected = torch.cat([3 * A.double(), product] if left else [product, 3 * A.double()], dim=-1)
    expected[1] = 0
    found, squares = join(A, halves, W, inverse, 3.0, dtype, left=left)
    # float16's rounding of an element, or sums of `width` products of size 1 in float32.
    rounding = 2.0**-11 if dtype is torch.float16 else 1e-6
    assert torch.allclose(found.double(), expected, rtol=rounding, atol=1e-6 * width)
    assert torch.allclose(squares.double(), expected.square().sum(dim=1), rtol=1e-5)


@pytest.mark.parametrize("rank", [5, 40])
def test_what_a_product_lacks_to_be_orthonormal(rank):
    from mofasgd.kernels.gram import excess

    U, S, W = normal(3, 70, rank), normal(3, 70, rank), normal(3, 2 * rank, rank).double()
    close = torch.tensor([True, False, True], device=DEVICE)
    out = torch.zeros(3, rank, rank, dtype=torch.float64, device=DEVICE)
    excess(U, S, W, close, out)
    Q = torch.cat([U, S], dim=-1).double() @ W
    expected = (Q.mT @ Q - torch.eye(rank, device=DEVICE)) * close[:, None, None]
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-9)


def test_addresses_are_those_of_the_matrices():
    a, b = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    table, aligned = pointers([a, None, b], 3, 64, torch.device("cpu"))
    assert table.tolist() == [*(a.data_ptr() + 64 * i for i in range(3)), 0, 0, 0, *(b[i].data_ptr() for i in range(3))]
    assert aligned == all(address % 16 == 0 for address in table.tolist())
    assert not pointers([a.view(-1)[1:]], 1, 64, torch.device("cpu"))[1]


def test_what_decay_leaves_may_be_a_part_of_more():
    from mofasgd.kernels.apply import apply_factored

    weights, keep = normal(2, 20, 24), torch.tensor([0.5, 9.0, 0.25], device=DEVICE)[::2]
    expected = weights * keep[:, None, None]
    steps, zero = torch.ones(2, device=DEVICE), torch.zeros(2, 20, 3, device=DEVICE)
    keys = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
    apply_factored(list(weights), zero, normal(2, 24, 3), keep, keys, steps, stochastic=False)
    assert torch.equal(weights, expected)
