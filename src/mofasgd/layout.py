"""How a parameter of any shape is seen as a batch of matrices (b, m, n)."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from torch import Tensor

LAYOUTS = ("matrix", "flatten", "stack")


class MatrixShape(NamedTuple):
    """A parameter as `batch` matrices of m rows and n columns; `lead` are the stacked dimensions."""

    lead: tuple[int, ...]
    m: int
    n: int

    @property
    def batch(self) -> int:
        """Number of matrices."""
        return math.prod(self.lead)


def default_layout(dimensions: int) -> str:
    """Return the layout of a parameter of two or more dimensions that none was asked for."""
    return {2: "matrix", 3: "stack"}.get(dimensions, "flatten")


def resolve_layout(layout: str | None, shape: tuple[int, ...]) -> str:
    """Return the layout of a parameter: as asked, else matrix (2-D), stack (3-D) or flatten (4-D and more).

    Raises:
        ValueError: for an unknown name, a vector, or a layout that does not fit the number of dimensions.
    """
    if len(shape) < 2:
        raise ValueError(
            f"a parameter of shape {tuple(shape)} has no matrix to factorize: put it in a group with "
            "algorithm='adamw', or let mofasgd.param_groups(model) sort the parameters"
        )
    if 0 in shape:
        raise ValueError(
            f"a parameter of shape {tuple(shape)} is empty (a shard of FSDP1 or ZeRO?): use FSDP2 or replicas"
        )
    if layout is None:
        return default_layout(len(shape))
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    if layout == "matrix" and len(shape) != 2:
        raise ValueError(f"layout='matrix' does not fit a parameter of shape {tuple(shape)}: use 'stack' or 'flatten'")
    return layout


@functools.lru_cache(maxsize=4096)
def matrix_shape(layout: str | None, shape: tuple[int, ...]) -> MatrixShape:
    """Return how a parameter of `shape` is cut into matrices under `layout` (None: the default of its shape)."""
    resolved = resolve_layout(layout, shape)
    if resolved == "stack":
        return MatrixShape(tuple(shape[:-2]), shape[-2], shape[-1])
    return MatrixShape((), shape[0], math.prod(shape[1:]))


def as_matrices(tensor: Tensor, shape: MatrixShape) -> Tensor:
    """Return `tensor` as (batch, m, n): a view where its strides allow it, a copy otherwise."""
    return tensor.reshape(shape.batch, shape.m, shape.n)
