"""What the small algebra reads of Gram matrices, by a kernel and by torch."""

import pytest
import torch

from mofasgd import algebra

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def case(rank):
    """Return Gram matrices and singular values of six matrices: the plain one is the first."""
    tall = torch.randn(2, 6, 60, 2 * rank, device=DEVICE)
    s = torch.rand(6, rank, device=DEVICE).sort(descending=True).values
    # Sketches that are not finite, one of each side; none; a momentum of zero; completion columns.
    tall[0, 1, 3, rank], tall[1, 2, 5, -1] = torch.nan, torch.inf
    tall[:, 3, :, rank:] = 0
    s[4] = 0
    s[5, 1:] = 1e-6 * s[5, :1]
    return tall.double().mT @ tall.double(), s


@pytest.mark.parametrize("rank", [1, 5, 32, *([40] if DEVICE.type == "cpu" else [128, 200])])
def test_one_launch_observes_what_torch_does(rank, monkeypatch):
    grams, s = case(rank)
    monkeypatch.setattr(algebra, "usable", lambda device: False)
    expected, finite, moves, norms = algebra.observed(grams.clone(), s)
    monkeypatch.setattr(algebra, "usable", lambda device: True)
    found, *flags, squares = algebra.observed(grams, s)
    assert flags[0].tolist() == finite.tolist() == [True, False, False, True, True, True]
    assert flags[1].tolist() == moves.tolist() == [True, False, False, False, True, True]
    for name, value in expected._asdict().items():
        own = getattr(found, name)
        assert own.dtype is value.dtype
        assert torch.equal(own, value), name
    # Of a sum of 2 r^2 numbers in another order.
    assert torch.allclose(squares, norms, rtol=1e-12, atol=0)
