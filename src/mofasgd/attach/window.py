"""The sketches of one parameter's gradient between two steps.

===================  ===============================  ================================
matrix               right sketch (b, m, .)           left sketch (b, n, .)
===================  ===============================  ================================
with a momentum      G V, r columns                   G' U, r columns
in its first window  Y = G Omega, l columns           Z = G' Psi, k columns
small, in its first  G itself (b, m, n): `momentum.starts_from_gradient`
===================  ================================================================

All are linear in G and U, V stand still between two steps, so the sketches of micro-batches, of several uses of a
weight and of whatever dense gradient still reaches it add up. They are by all columns of the stored U and V, without
a copy; the step drops those that are no directions of M.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from mofasgd.dist.shards import local, part_of
from mofasgd.gradient import FirstWindow
from mofasgd.layout import MatrixShape, as_matrices
from mofasgd.precision import in_true_float32
from mofasgd.rng import key_tensor

Pair = tuple[Tensor, ...]

Operands = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, "Window | None"]
"""(weight, U, V, None, window), or (weight, None, None, keys, window) while pending; keys are `FirstWindow.keys` on the
device. No window in compiled graphs, which must not hold what would make them another one for each layer."""


def _leaf(rows: int, columns: int, first: FirstWindow, device: torch.device) -> Tensor:
    # Never read, so one element serves as them all.
    return torch.zeros((), dtype=first.dtype, device=device).expand(rows, columns).requires_grad_()


def _plus(total: Pair | None, more: Pair | None) -> Pair | None:
    if total is None or more is None:
        return total if more is None else more
    return tuple(a + b for a, b in zip(total, more, strict=True))


_HALVES = (torch.bfloat16, torch.float16)


def sums_unrounded(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether `out_dtype` makes products of matrices like `t` leave their sums in `dtype`: one kernel, more exact."""
    return t.is_cuda and t.dtype in _HALVES and dtype is torch.float32


_TILE = 1 << 22
"""Elements of a gradient that are cast at a time."""


def _rounded(factors: Tensor, dtype: torch.dtype) -> Tensor:
    # A test matrix that all matrices of a stack share stays one.
    shared = factors.stride(0) == 0
    return factors[:1].to(dtype).expand_as(factors) if shared else factors.to(dtype)


@in_true_float32
def _add_sketch(GV: Tensor, GtU: Tensor, G: Tensor, U: Tensor, V: Tensor) -> None:
    """Add G V and G' U to sums in the dtype of U, in place and without a copy of G in it."""
    batch, m, n = G.shape
    if G.dtype is U.dtype:
        GV.baddbmm_(G, V)
        GtU.baddbmm_(G.mT, U)
        return
    if sums_unrounded(G, U.dtype):
        # By U and V rounded to G's dtype, as the kernels of dense gradients (`kernels.project`).
        GV += torch.bmm(G, _rounded(V, G.dtype), out_dtype=GV.dtype)
        GtU += torch.bmm(G.mT, _rounded(U, G.dtype), out_dtype=GtU.dtype)
        return
    matrices, rows = max(1, _TILE // (m * n)), max(1, _TILE // n)
    for i in range(0, batch, matrices):
        some = slice(i, i + matrices)
        for j in range(0, m, rows):
            tile = G[some, j : j + rows].to(U.dtype)
            GV[some, j : j + rows] += tile @ V[some]
            GtU[some].baddbmm_(tile.mT, U[some, j : j + rows])


class Window:
    """What backward has said of a factored parameter's gradient since the last step; a `gradient.Gradient`.

    Attributes:
        name, param, state: the parameter, and the optimizer's state of it.
        first: how its gradient is sketched before it has a momentum.
        probed: whether layers sketch it (a 2-D weight then), or its dense gradients only.
        pending: numbers of the matrices without a momentum.
        probes: zeros (m, .) and (n, .) whose `.grad` autograd makes the sketches, or None: dense gradients only.
        keys: of the test matrices while layers sketch by them, on the device (`rng.key_tensor`).
        stepped: whether the parameter has been stepped in backward since the last step.
        ran: whether a layer has put the probes into a graph since the last step.
        part: what this rank holds of the parameter, if it is sharded.
        shared: whether the sums are those of all ranks.
    """

    def __init__(
        self, name: str, param: Tensor, state: dict[str, Tensor], first: FirstWindow, pending: list[int], probed: bool
    ) -> None:
        self.name, self.param, self.state, self.first, self.probed = name, param, state, first, probed
        self.part = part_of(param)
        self.weight = param
        self.probes: tuple[Tensor, Tensor] | None = None
        self.keys: Tensor | None = None
        self.pending: list[int] = []
        self._casts: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self.open(pending)

    def serves(self, param: Tensor, state: dict[str, Tensor], first: FirstWindow) -> bool:
        """Whether this window, after `probe`, is the one that these arguments of the constructor ask for."""
        # The number is that of the first window's test matrices, which one with a momentum does not read.
        drawn = self.first if self.pending else replace(self.first, index=first.index)
        same = self.param is param and self.state is state and drawn == first
        return same and all(value.device == param.device for value in self.probes or ())

    def open(self, pending: list[int]) -> None:
        """Begin a window in which the matrices number `pending` have no momentum."""
        self.stepped = False
        if not pending and not self.pending and self.keys is None and (self.probes is not None) is self.probed:
            # As the last one: what hundreds of layers do at every step.
            self.clear()
            return
        self.pending = pending
        if not pending and self.keys is not None:
            # A graph kept from the first window then raises; its sketches would go to probes that nobody reads.
            self.keys.zero_()
            self.keys = None
        if not self.probed and self.probes is not None:
            self.end()
            self.probes = None
        self.probe(self.probed)
        self.clear()

    def probe(self, probed: bool) -> None:
        """Let layers sketch the gradient or not, from now on. What has been gathered stays, and what layers add to it
        by graphs made before counts until the step.
        """
        self.probed = probed
        if not probed:
            return
        if self.pending and self.first.dense:
            self.probes = None
            return
        if self.pending and self.keys is None:
            self.keys = key_tensor(self.first.keys, self.param.device)
        right, left = self.first.widths if self.pending else (self.first.rank, self.first.rank)
        if self.probes is None or self.probes[0].shape[1] != right:
            (_, m, n), device = self.first.shape, self.param.device
            self.probes = (_leaf(m, right, self.first, device), _leaf(n, left, self.first, device))

    def end(self) -> None:
        """Take nothing any more: backward through what layers made before raises, lest their gradient be lost."""
        self.clear()
        if self.probes is not None:
            keys = self.keys
            torch.autograd.graph.increment_version((self.state["U"], self.state["V"]) if keys is None else keys)

    def clear(self) -> None:
        """Forget what backward has said so far. The probes stay: a graph made before may be run after."""
        self._sketches: Pair | None = None
        self._start: Pair | None = None
        self.ran = self.shared = False
        for probe in self.probes or ():
            probe.grad = None

    @property
    def empty(self) -> bool:
        """Whether no gradient has come."""
        if self.probes is not None and self.probes[0].grad is not None:
            return False
        return self._sketches is None and self._start is None

    @property
    def nbytes(self) -> int:
        """Bytes of what has been gathered."""
        held = (*(self._sketches or ()), *(self._start or ()), *(self._probed() or ()))
        return sum(t.numel() * t.element_size() for t in held)

    def _probed(self) -> Pair | None:
        if self.probes is None:
            return None
        right, left = self.probes[0].grad, self.probes[1].grad
        return None if right is None or left is None else (right[None], left[None])

    def operands(self) -> tuple[Tensor, Tensor, Operands]:
        """Return the right and the left probe, and what else a layer's backward reads."""
        assert self.probes is not None
        window = None if torch.compiler.is_compiling() else self
        if window is not None:
            self.ran = True
        right, left = self.probes
        if self.keys is not None:
            return right, left, (self.weight, None, None, self.keys, window)
        return right, left, (self.weight, self.state["U"], self.state["V"], None, window)

    def gathered(self, weight: Tensor | None) -> bool:
        """Whether `weight`, which a layer holds in its forward, is what FSDP2 has gathered the parameter into."""
        if self.part is None or weight is None or weight.shape != self.param.shape or part_of(weight) is not None:
            return False
        self.weight = weight
        return True

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return U (m, r) and V (n, r) in the dtype of a layer, cast once per step."""
        if dtype not in self._casts:
            self._casts[dtype] = (self.state["U"].to(dtype), self.state["V"].to(dtype))
        return self._casts[dtype]

    def casts(self) -> Iterable[torch.dtype]:
        """Return the dtypes to which factors have been cast; whoever changes these casts them anew (`recast`)."""
        return self._casts

    def recast(self, dtype: torch.dtype, U: Tensor, V: Tensor) -> None:
        """Take U and V as the factors cast to `dtype`, which the giver keeps up to date."""
        self._casts[dtype] = U, V

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """Add a dense gradient of the parameter's shape; it is read only, and cast a tile at a time.

        Of a sharded one the rows of this rank; what they add to the left sketch is a part of a sum over ranks.
        """
        first, (_, m, n) = self.first, self.first.shape
        batch = first.shape.batch
        held, rows = (slice(0, batch), slice(0, m)) if self.part is None else self.part.slices(first.shape)
        G = local(gradient)
        if not G.numel():
            return
        G = as_matrices(G, MatrixShape((held.stop - held.start,), rows.stop - rows.start, n))
        if len(self.pending) < batch:
            U, V = (self.state[key].reshape(batch, -1, first.rank) for key in "UV")
            GV, GtU = self._sums()
            _add_sketch(GV[held, rows], GtU[held], G, U[held, rows], V[held])
        if not self.pending:
            return
        # Places among the pending matrices, and in G.
        places = [(i, p - held.start) for i, p in enumerate(self.pending) if held.start <= p < held.stop]
        if not places:
            return
        some = slice(places[0][0], places[-1][0] + 1)
        G = G if len(places) == len(G) else G[[place for _, place in places]]
        sums = self._start_sums()
        if first.dense:
            sums[0][some, rows] += G
            return
        Omega, Psi = first.right(G.device), first.left(G.device)[rows]
        Y, Z = sums
        _add_sketch(Y[some, rows], Z[some], G, Psi.expand(len(G), -1, -1), Omega.expand(len(G), -1, -1))

    def _sums(self) -> Pair:
        """Return the sums of the sketches of dense gradients, made now if there are none."""
        if self._sketches is None:
            (b, m, n), like = (self.first.shape.batch, *self.first.shape[1:]), self.state["U"]
            self._sketches = tuple(like.new_zeros(b, size, self.first.rank) for size in (m, n))
        return self._sketches

    def _start_sums(self) -> Pair:
        """Return the same of the first window."""
        if self._start is None:
            (_, m, n), like, count = self.first.shape, self.state["U"], len(self.pending)
            sizes = [(m, n)] if self.first.dense else list(zip((m, n), self.first.widths, strict=True))
            self._start = tuple(like.new_zeros(count, *size) for size in sizes)
        return self._start

    def share(self, ranks: int) -> tuple[list[Tensor], bool]:
        """Return tensors whose sum over `ranks` ranks, in place, makes this window that of their mean gradient.

        And whether they are to be divided by `ranks` before: what hundreds of windows need is divided at once. A rank
        to which nothing came gives zeros. What layers have sketched is of this rank's batch; the rows of a sharded
        gradient have been averaged before, and those of a whole one have not.
        """
        self.shared = True
        of_tensors = ranks if self.part is None else self.part.replicas
        probed, batch = self._probed(), self.first.shape.batch
        held = [*(self._sketches or ()), *(self._start or ())]
        if probed is not None and not held:
            self._take(probed)
            return list(probed), True
        if of_tensors > 1 and held:
            torch._foreach_div_(held, of_tensors)
        sums = [*(self._sums() if len(self.pending) < batch else ()), *(self._start_sums() if self.pending else ())]
        if probed is not None:
            torch._foreach_add_(sums, list(probed), alpha=1 / ranks)
            for probe in self.probes or ():
                probe.grad = None
        return sums, False

    def _take(self, probed: Pair) -> None:
        """Hold what layers have sketched as this window's own sums."""
        if self.pending:
            self._start = probed
        else:
            self._sketches = probed
        for probe in self.probes or ():
            probe.grad = None

    def sketches(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of (G V, G' U); zeros where no matrix has a momentum. U and V are those of the state."""
        total = _plus(self._sketches, None if self.pending else self._probed())
        if total is None:
            return torch.zeros_like(U), torch.zeros_like(V)
        GV, GtU = total
        return GV, GtU

    def ready(self) -> tuple[Tensor, Tensor] | None:
        """Return what layers have sketched, (m, r) and (n, r), if that is all there is."""
        if self.pending or self.probes is None or self.first.shape.lead:
            return None
        if self._sketches is not None:
            # Nothing is added to what ranks have shared.
            return (self._sketches[0][0], self._sketches[1][0]) if self.shared else None
        right, left = self.probes[0].grad, self.probes[1].grad
        return None if right is None or left is None else (right, left)

    def start(self, first: FirstWindow, places: Tensor | None) -> Pair:
        """Hand over the sums of the first window; they are no longer held here."""
        total = _plus(self._start, self._probed() if self.pending else None)
        assert total is not None
        self.clear()
        return total

    def dense(self) -> Tensor:
        """Raise ValueError: the gradient was never kept."""
        raise ValueError(
            f"the full gradient of {self.name!r} was not kept: detach, or use attach(model, mode='release', "
            "step_in_backward=True)"
        )
