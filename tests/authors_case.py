"""The authors' published step, recomputed on dense float64 matrices."""

import numpy as np


class Theirs:
    """One weight's momentum: from the weight's own SVD, beta M + Ghat, and a step along U diag(1/s) V'."""

    def __init__(self, W, rank):
        U, s, Vh = np.linalg.svd(W, full_matrices=False)
        self.U, self.s, self.V, self.r = U[:, :rank], s[:rank], Vh[:rank].T, rank

    def step(self, W, G, lr, beta, eta1, eps, most):
        P, Q = self.U @ self.U.T, self.V @ self.V.T
        U, s, Vh = np.linalg.svd(beta * (self.U * self.s) @ self.V.T + P @ G + G @ Q - P @ G @ Q, full_matrices=False)
        self.U, self.s, self.V = U[:, : self.r], s[: self.r], Vh[: self.r].T
        height = np.where(self.s > eps, np.minimum(1 / np.maximum(self.s, 1e-300), most), 0.0)
        return W - lr * eta1 * (self.U * height) @ self.V.T
