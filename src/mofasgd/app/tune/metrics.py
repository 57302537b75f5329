"""GLUE's metrics. Each takes predictions and labels, 1-D of the same length, and is 0 where it is undefined."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of equal classes."""
    return float((predicted == labels).double().mean())


def f1(predicted: Tensor, labels: Tensor) -> float:
    """Return 2 tp / (2 tp + fp + fn) of class 1."""
    hit = float(((predicted == 1) & (labels == 1)).sum())
    total = float((predicted == 1).sum() + (labels == 1).sum())
    return 2 * hit / total if total else 0.0


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Return the linear correlation."""
    x, y = predicted.double(), labels.double()
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale else 0.0


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Return Matthews' correlation of two classes, which is Pearson's of the classes as numbers."""
    return pearson(predicted, labels)


def ranks(values: Tensor) -> Tensor:
    """Return the place of each value in ascending order; equal values share the mean of their places."""
    _, inverse, counts = torch.unique(values.double(), return_inverse=True, return_counts=True)
    found: Tensor = (counts.cumsum(0) - (counts.double() - 1) / 2)[inverse]
    return found


def spearman(predicted: Tensor, labels: Tensor) -> float:
    """Return the correlation of the ranks."""
    return pearson(ranks(predicted), ranks(labels))


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


def scores(names: tuple[str, ...], outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return each metric, and `score`, their mean in percent, which GLUE reports of a task.

    Args:
        names: of METRICS.
        outputs: (rows, classes) logits, or (rows, 1) numbers.
        labels: (rows,) classes or numbers.
    """
    predicted = outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(1)
    found = {name: METRICS[name](predicted, labels) for name in names}
    return {**found, "score": 100 * sum(found.values()) / len(found)}
