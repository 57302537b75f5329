"""The case that is recorded from galore-torch and replayed by our GaLore."""

import numpy as np
import torch

SHAPES = [(12, 8), (8, 12), (9, 9)]
OPTIONS = {"lr": 0.01, "rank": 3, "gap": 4, "scale": 0.25, "weight_decay": 0.1}


def weights(shape):
    return torch.from_numpy(np.random.default_rng(shape[0]).standard_normal(shape)).float()


def gradients(shape):
    rng = np.random.default_rng(100 + shape[0])
    drift = rng.standard_normal(shape)
    return [torch.from_numpy(drift + rng.standard_normal(shape)).float() for _ in range(10)]
