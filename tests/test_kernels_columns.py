"""Gram-Schmidt on Gram matrices, by torch and by kernels: in Triton's interpreter on a CPU, compiled on a GPU."""

import pytest
import torch

from mofasgd import columns

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def by_kernel(gram):
    from mofasgd.kernels.columns import independent_columns

    R, N = independent_columns(gram.to(DEVICE), columns.DEPENDENT)
    return R.cpu(), N.cpu()


def by_pivots(gram, squares=None):
    from mofasgd.kernels.columns import pivoted_columns

    gram = gram.to(DEVICE)
    squares = gram.diagonal(dim1=-2, dim2=-1) if squares is None else squares.to(DEVICE)
    R, N, closest = pivoted_columns(gram, squares, columns.DEPENDENT, columns.SHARE, columns.ENOUGH)
    return R.cpu(), N.cpu(), closest.cpu()


@pytest.mark.parametrize(
    ("factorize", "k"),
    [(columns.independent_columns, k) for k in (10, 64, 130)] + [(by_kernel, k) for k in (10, 20, 64, 72)]
    + [(by_pivots, k) for k in (10, 20, 40, 72)],
)  # fmt: skip
def test_dependent_columns_are_left_out(factorize, k):
    A = torch.randn(4, 2 * k, k, dtype=torch.float64) * torch.logspace(0, 9, k, dtype=torch.float64)
    A[1, :, 3] = A[1, :, :3].sum(dim=-1)
    A[2, :, 5:] = 0
    # Nearly dependent columns, whose Gram matrix has lost most of what tells them apart.
    A[3] = A[3, :, :1] + 1e-4 * A[3]
    R, N = factorize(A.mT @ A)[:2]
    Q = A @ N
    expected = torch.ones(4, k, dtype=torch.float64)
    expected[1, 3], expected[2, 5:] = 0, 0
    assert (Q.mT @ Q - torch.diag_embed(expected))[:3].abs().max() <= 1e-9
    assert (Q.mT @ Q - torch.diag_embed(expected))[3].abs().max() <= 1e-6
    assert ((Q @ R - A).norm(dim=-2) / A.norm(dim=-2).clamp(min=1e-30)).max() <= 1e-9


@pytest.mark.parametrize("factorize", [columns.independent_columns, by_kernel, by_pivots])
@pytest.mark.parametrize(("distance", "kept"), [(2e-6, False), (5e-5, True)])
def test_a_column_depends_on_others_by_its_distance_to_them(factorize, distance, kept):
    A = torch.linalg.qr(torch.randn(2, 40, 11, dtype=torch.float64))[0]
    A[:, :, 3] = A[:, :, 0] + distance * A[:, :, 10]
    N = factorize(A[:, :, :10].mT @ A[:, :, :10])[1]
    assert (N[:, :, 3].norm(dim=-1) > 0).tolist() == [kept, kept]


@pytest.mark.parametrize("factorize", [columns.pivoted_columns, by_pivots])
def test_a_column_of_which_little_is_left_waits_for_one_that_shows_its_direction_better(factorize):
    # Of columns of length 1 others have left one direction, of the first hardly more than rounding.
    left = torch.randn(3, 1, 12, dtype=torch.float64)
    left[:, :, 0] = 2e-5
    rounding = 1e-15 * torch.randn(3, 12, 12, dtype=torch.float64)
    gram = left.mT @ left + rounding + rounding.mT
    R, N, _ = factorize(gram, torch.ones(3, 12, dtype=torch.float64))
    kept = N.norm(dim=-2) > 0
    assert kept.sum(dim=-1).tolist() == [1, 1, 1]
    assert ((left @ N).norm(dim=-2)[kept] - 1).abs().max() <= 1e-10
    assert (R.mT @ R - gram).abs().max() <= 1e-12


@pytest.mark.parametrize(("factorize", "k"), [(columns.pivoted_columns, 12), (by_pivots, 12), (by_pivots, 72)])
def test_the_given_order_stays_only_where_it_is_that_of_the_pivots(factorize, k):
    A = torch.linalg.qr(torch.randn(2, k + 9, k, dtype=torch.float64))[0]
    A = A + 0.1 * A[:, :, -1:]
    # Of the first column of the second matrix others have left little: it comes last.
    A[1, :, 0] *= 1e-4
    gram = A.mT @ A
    R, N, closest = factorize(gram, torch.ones(2, k, dtype=torch.float64))
    assert ((R[:, 0, 1:] != 0).any(dim=-1)).tolist() == [True, False]
    assert (R.mT @ R - gram).abs().max() <= 1e-12
    assert ((A @ N).mT @ A @ N - torch.eye(k)).abs().max() <= 1e-7
    assert closest[0] > 0.1
    assert abs(closest[1] / 1e-8 - 1) <= 1e-4
