"""MoFaSGD on dense float64 matrices, in numpy: projectors and full SVDs, no factors carried from step to step."""

import numpy as np


def truncate(A, r):
    """Best rank-r approximation of A."""
    U, s, Vh = np.linalg.svd(A, full_matrices=False)
    return (U[:, :r] * s[:r]) @ Vh[:r]


def bases(M, r):
    """Orthonormal bases of the column and the row space of M, of rank r."""
    U, _, Vh = np.linalg.svd(M, full_matrices=False)
    return U[:, :r], Vh[:r].T


def tangent(G, U, V):
    """G projected on the tangent space of the rank-r matrices at U diag(s) V'."""
    PU, PV = U @ U.T, V @ V.T
    return PU @ G + G @ PV - PU @ G @ PV


def polar(M, tol=1e-5):
    """M with all its real singular values set to 1."""
    U, s, Vh = np.linalg.svd(M, full_matrices=False)
    return (U * (s > tol * s[0])) @ Vh


def orth(A):
    """Orthonormal basis of the numerical range of A."""
    U, s, _ = np.linalg.svd(A, full_matrices=False)
    return U[:, s > 1e-8 * s[0]]


def complement(G, U, V):
    """Row-normalized part of G outside the spaces of [U GV] and [V G'U]."""
    m, n = G.shape
    Q, P = orth(np.hstack([U, G @ V / np.linalg.norm(G)])), orth(np.hstack([V, G.T @ U / np.linalg.norm(G)]))
    R = (np.eye(m) - Q @ Q.T) @ G @ (np.eye(n) - P @ P.T)
    E = np.zeros_like(R)
    for i in range(m):
        length = np.linalg.norm(R[i])
        if length > 1e-3 * np.linalg.norm(G[i]):
            E[i] = R[i] / (length * np.sqrt(m))
    return E


class DenseMoFaSGD:
    """One matrix; M_1 = SVD_r(G), which the optimizer's start equals for small matrices and for rank(G) <= r."""

    def __init__(self, W, rank, lr, beta=0.95, decay=0.0, c=0.0, scale=1.0):
        self.W, self.rank, self.lr, self.beta, self.decay, self.c, self.scale = (
            W.copy(),
            rank,
            lr,
            beta,
            decay,
            c,
            scale,
        )
        self.M = None

    def norm(self, G):
        if self.M is None:
            return np.linalg.norm(truncate(G, self.rank))
        return np.linalg.norm(tangent(G, *bases(self.M, self.rank)))

    def step(self, G, clip=1.0):
        m, n = G.shape
        if self.M is None:
            self.M = truncate(clip * G, self.rank)
            U, V = bases(self.M, self.rank)
        else:
            U, V = bases(self.M, self.rank)
            self.M = truncate(self.beta * self.M + tangent(clip * G, U, V), self.rank)
        D = polar(self.M)
        if self.c:
            D = D + self.c * np.sqrt(min(m, n)) * complement(G, U, V)
        self.W = (1 - self.lr * self.decay) * self.W - self.lr * self.scale * D
