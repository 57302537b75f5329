"""AuthorsMFSGD against the authors' published formulas, recomputed on dense float64 matrices."""

import copy

import numpy as np
import pytest
import torch
from reference import bases, tangent, truncate
from torch import nn

from mofasgd.paper import AuthorsMFSGD


class DenseAuthors:
    """Their step from dense matrices: start from W, M <- beta M + Ghat, reciprocal singular values."""

    def __init__(self, W, rank, o):
        self.W, self.r, self.o = W.copy(), rank, o
        self.M = truncate(W, rank)

    def update(self, M, G):
        return truncate(self.o["beta"] * M + tangent(G, *bases(M, self.r)), self.r)

    def step(self, G):
        o, old = self.o, self.M
        self.M = self.update(old, G)
        used = self.update(self.M, G) if o["nesterov"] else self.M
        U, s, Vh = np.linalg.svd(used)
        h = np.ones(self.r) if o["use_ones_for_nonzero_s"] else np.minimum(1 / s[: self.r], o["max_value"])
        h = np.where(s[: self.r] > o["eps"], h, 0.0)
        D = o["eta1"] * (U[:, : self.r] * h) @ Vh[: self.r]
        P, Q = bases(used if o["use_current_projection"] else old, self.r)
        R = G - P @ (P.T @ G)
        self.W = self.W - o["lr"] * (D + o["eta2"] * (R - (R @ Q) @ Q.T))


BASE = {
    "lr": 0.01,
    "beta": 0.9,
    "eta1": 0.5,
    "eta2": 0.0,
    "use_current_projection": False,
    "use_ones_for_nonzero_s": False,
    "eps": 1e-4,
    "nesterov": False,
    "max_value": 10000,
}
VARIANTS = [
    {},
    {"eta2": 0.3},
    {"eta2": 0.3, "use_current_projection": True},
    {"nesterov": True, "eta2": 0.3, "use_current_projection": True},
    {"use_ones_for_nonzero_s": True},
    {"max_value": 0.2},
    {"eps": 30.0, "lr": 0.1},
    {"nesterov": True, "eta2": 0.3},
]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_twenty_steps_equal_the_published_formula(changes, shape):
    options = BASE | changes
    rng = np.random.default_rng(0)
    W = nn.Parameter(torch.from_numpy(rng.standard_normal(shape)).float())
    dense = DenseAuthors(W.detach().double().numpy(), 3, options)
    opt = AuthorsMFSGD([W], rank=3, **options)
    drift, begin = rng.standard_normal(shape), dense.W.copy()
    for _ in range(20):
        G = (drift + rng.standard_normal(shape)).astype(np.float32)
        dense.step(G.astype(np.float64))
        W.grad = torch.from_numpy(G)
        opt.step()
    assert np.abs(W.detach().numpy() - dense.W).max() <= 1e-5
    assert np.abs(dense.W - begin).max() >= 1e-3


def test_a_copy_keeps_the_options_and_a_bad_one_raises():
    opt = AuthorsMFSGD([nn.Parameter(torch.randn(5, 4))], eta2=0.7, nesterov=True)
    assert (copy.deepcopy(opt).eta2, copy.deepcopy(opt).nesterov) == (0.7, True)
    with pytest.raises(ValueError, match="eta2=-1"):
        AuthorsMFSGD([nn.Parameter(torch.randn(5, 4))], eta2=-1)


@pytest.mark.parametrize("name", ["rank", "beta", "eta1", "eta2", "eps", "max_value", "nesterov"])
def test_none_is_no_value(name):
    """MoFaSGD takes some of them for "not given", which would be other defaults."""
    with pytest.raises(ValueError, match=rf"^{name}=None should be"):
        AuthorsMFSGD([nn.Parameter(torch.randn(5, 4))], **{name: None})
