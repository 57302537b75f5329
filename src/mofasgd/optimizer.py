"""The MoFaSGD optimizer: one `torch.optim.Optimizer` for a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, overload

import torch
from torch import Tensor

from mofasgd.adamw import AdamWMember, AdamWUpdate
from mofasgd.algebra import SOLVERS
from mofasgd.apply import Rounding
from mofasgd.attach.window import Window
from mofasgd.base import FactoredOptimizer, alone
from mofasgd.buckets import Arrangement, Bucket, Member
from mofasgd.clipping import count_bad, measure
from mofasgd.dist.shards import local, part_of
from mofasgd.exchange import Exchange
from mofasgd.factored import Context, Displace, Update, observe_all, take_all
from mofasgd.gradient import DenseGradient
from mofasgd.options import Group, check_choice, check_flag, check_polar, check_whole, complete
from mofasgd.start import Start
from mofasgd.state import factored_shape, waiting

_STATE_DTYPES = (torch.float32, torch.float64)


@dataclass
class Taken:
    """Of the parameters that were stepped in backward: squared norms, finiteness, and which were pending."""

    squares: list[Tensor] = field(default_factory=list)
    finite: list[Tensor] = field(default_factory=list)
    started: list[Tensor] = field(default_factory=list)


class MoFaSGD(FactoredOptimizer):
    r"""Spectrally normalized SGD with a rank-r factored momentum (MoFaSGD), and AdamW for what is not factored.

    For a weight W (m x n) with gradient G the first moment is kept as M = U diag(s) V' of rank r:

    .. math::
        (U, s, V) &\leftarrow \mathrm{SVD}_r(\beta M + \hat G), \qquad
            \hat G = U U^\top G + G V V^\top - U U^\top G V V^\top \\
        W &\leftarrow (1 - \mathrm{lr}\,\lambda) W - \mathrm{lr}\,\mathrm{scale}\,(U V^\top + c\sqrt{\min(m, n)}\, E)

    where E is the row-normalized part of G that the projection loses (`complement` = c; 0 is the paper's step).
    The state is (m + n + 1) r numbers instead of AdamW's 2 m n.

    Args:
        params: tensors, or groups as `mofasgd.param_groups(model)` makes them. Group keys: `algorithm` ("mofasgd",
            the default, or "adamw"); for mofasgd `lr`, `rank`, `beta`, `weight_decay`, `complement`, `update`,
            `lr_scale`, `layout` ("matrix", "flatten", "stack"; default by the number of dimensions) and
            `transposed` (rows of W are inputs, not outputs); for adamw `lr`, `betas`, `eps`, `weight_decay`.
        lr: learning rate: spectral norm of the change of W in one step, before `lr_scale`. A float or 0-dim tensor.
        rank: r, lowered (with a warning) for a matrix whose smaller side is below it.
        beta: momentum decay in [0, 1). The recursion is beta M + Ghat, without a factor (1 - beta).
        weight_decay: decoupled; W shrinks by lr * weight_decay a step. At lr 0.02 a decay of 0.1 forgets a
            pretrained matrix within 500 steps.
        complement: c >= 0, weight of the normalized complement; 1 to 2 for pre-training.
        update: "polar" (the paper's U V') or "reciprocal" (the authors' code: U diag(1/s) V').
        lr_scale: "spectral" (lr times sqrt(max(1, out / in))), "none", or "match_rms_adamw" (root mean square of
            the update 0.2 lr, so that a learning rate of AdamW carries over).
        max_grad_norm: clip the gradient to this norm, over all parameters by one factor; None does not clip.
            Factored parameters count with the norm of Ghat.
        state_dtype: dtype of factors and of AdamW's moments, float32 or float64.
        stochastic_rounding: round bfloat16 weights at random, unbiased and reproducible, instead of to nearest.
        solver: "svd" (QR and LAPACK's SVD), "gram" (Gram matrices in float64 and small algebra that all shapes of a
            rank share; `mofasgd.algebra` has its budget), or "auto": "gram" for factors in float32.
        seed: of the start's test matrices and of stochastic rounding; torch's generators are not used.
        adamw_betas, adamw_eps: defaults of the AdamW groups.
        eta1, clip_eps, max_value: for update="reciprocal" only: factor of the step, the singular value at or below
            which a direction does not move, and the largest reciprocal. Defaults 1, 1e-4, 1e4.

    Raises:
        ValueError: for a value out of range, an unknown or ineffective key, or a parameter that cannot be factored.

    Example:
        >>> from mofasgd import MoFaSGD, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> opt = MoFaSGD(param_groups(model, rank=4, lr=0.02))
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> opt.step(); opt.zero_grad()

    Source: "Low-rank Momentum Factorization for Memory Efficient Training", TMLR 2025. Deviations are listed in
    `mofasgd.momentum`; the published code's own step is `mofasgd.paper.AuthorsMFSGD`.
    """

    _arrangement: Arrangement | None

    # GradScaler then hands over `grad_scale` and `found_inf` instead of deciding on the host.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.02,
        *,
        rank: int = 32,
        beta: float = 0.95,
        weight_decay: float = 0.0,
        complement: float = 0.0,
        update: str = "polar",
        lr_scale: str = "spectral",
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = True,
        solver: str = "auto",
        seed: int = 0,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        eta1: float | None = None,
        clip_eps: float | None = None,
        max_value: float | None = None,
    ) -> None:
        check_choice("solver", solver, SOLVERS)
        check_whole("seed", seed)
        check_flag("stochastic_rounding", stochastic_rounding)
        if state_dtype not in _STATE_DTYPES:
            raise ValueError(
                f"state_dtype={state_dtype} should be float32 or float64: bfloat16 factors lose orthonormality"
            )
        self._handle, self._taken, self._arrangement = None, Taken(), None
        vars(self).update(alone())
        self.max_grad_norm = max_grad_norm
        self.state_dtype, self.stochastic_rounding = state_dtype, stochastic_rounding
        self.solver, self.seed = solver, int(seed)
        self._factored_defaults: Group = {
            "lr": lr,
            "rank": rank,
            "beta": beta,
            "weight_decay": weight_decay,
            "complement": complement,
            "update": update,
            "lr_scale": lr_scale,
            "layout": None,
            "transposed": False,
        }
        reciprocal = {"eta1": eta1, "clip_eps": clip_eps, "max_value": max_value}
        self._factored_defaults |= {key: value for key, value in reciprocal.items() if value is not None}
        self._adamw_defaults: Group = {
            "lr": lr,
            "betas": adamw_betas,
            "eps": adamw_eps,
            "weight_decay": weight_decay,
        }
        # Checked even if every group brings its own values.
        complete({"algorithm": "mofasgd"}, self._factored_defaults, self._adamw_defaults)
        complete({"algorithm": "adamw"}, self._factored_defaults, self._adamw_defaults)
        if update == "polar":
            check_polar(self._factored_defaults)
        self._pending, self._norm = None, None
        self._nonfinite, self._reported = 0, 0
        # Only what both algorithms read; add_param_group fills in the rest of each group.
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients in `p.grad`, which are read only; return the closure's loss.

        Of an attached parameter the step reads the sketches since the last step instead, and forgets them.
        A parameter without a gradient, or a matrix whose sketch is exactly zero, does not move, does not decay and
        keeps its momentum. A parameter whose gradient is not finite is left as it was and counted in
        `nonfinite_steps`.
        """
        # Set by GradScaler for the time of this call; without any gradient, found_inf is the int 0.
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | int | None = getattr(self, "found_inf", None)
        if self._handle is not None and not (grad_scale is None and found_inf is None):
            # GradScaler takes them back after a step only; a later one without it would read them.
            for left in ("grad_scale", "found_inf"):
                vars(self).pop(left, None)
            raise ValueError("GradScaler cannot unscale sketches of an attached model: use bfloat16, or detach()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        known = self._complete
        self.materialize()
        if self._handle is not None and self._complete is not known:
            # Sketches by the factors of another state are of no use.
            self._handle.bind()
        gate = found_inf.reshape(()) == 0 if isinstance(found_inf, Tensor) else None

        arranged = self._check()
        exchanged = self._exchange()
        if self._ranks is not None:
            # The exchange may have put rank 0's state in place of this rank's.
            arranged = self._arranged()
        try:
            self._advance(gate, arranged, exchanged, grad_scale)
        except BaseException:
            self._forget()
            raise
        return loss

    def _advance(
        self, gate: Tensor | None, arranged: Arrangement, exchanged: Exchange, grad_scale: Tensor | None
    ) -> None:
        """Take the step of all parameters and begin the next window."""
        updates = self._observe(gate, arranged, exchanged)
        observe_all([update for update in updates if isinstance(update, Update)])
        squares = self._taken.squares + [update.square_norms for update in updates]
        self._norm, factor = measure(squares, self.max_grad_norm, grad_scale)
        take_all([update for update in updates if isinstance(update, Update)], factor)
        for update in updates:
            if isinstance(update, AdamWUpdate):
                update.take(None if factor is None else factor.to(update.active.device))
        finite = self._taken.finite + [update.finite for update in updates]
        self._nonfinite = count_bad(self._nonfinite, finite, gate)
        self._settle(self._taken.started + [m.param for u in updates if isinstance(u, Start) for m in u.members])
        self._taken = Taken()
        self._compare_often()
        if self._handle is not None:
            self._handle.next_window(arranged.buckets)

    def _forget(self) -> None:
        """Drop what a step that failed midway has left: gradients that are held, sketches, casts, what is pending."""
        self._arrangement, self._pending, self._taken = None, None, Taken()
        if self._handle is not None:
            self._handle.renew()

    def _observe(self, gate: Tensor | None, arranged: Arrangement, exchanged: Exchange) -> list[Update | AdamWUpdate]:
        """Return the observed parameters with a gradient, the factored ones in batches."""
        context = self._context(gate)
        unfactored: dict[tuple[Any, ...], list[AdamWMember]] = {}
        for index, param, group in arranged.unfactored:
            plain = self._plain(index, param, group, exchanged)
            if plain is not None:
                unfactored.setdefault((id(group), param.device), []).append(plain)
        updates: list[Update | AdamWUpdate] = [AdamWUpdate(plain, gate) for plain in unfactored.values()]
        for members, pending in arranged.starting:
            self._see_gradients(members, self._windows(members), exchanged)
            seen = [member for member in members if member.gradient is not None]
            count = Start.most(members[0])
            buckets = (Bucket(seen[i : i + count]) for i in range(0, len(seen), count))
            updates += [Start(bucket, pending, context) for bucket in buckets]
        attached = None if self._handle is None else self._handle.windows_of(arranged.buckets)
        for i, bucket in enumerate(arranged.buckets):
            # One without a gradient stays beside the others, lest their state be moved in memory.
            if self._see_gradients(bucket.members, None if attached is None else attached[i], exchanged):
                updates.append(Update(bucket, context))
        return updates

    def _check(self) -> Arrangement:
        """Raise ValueError for what no step can be taken with, before any gradient is read or sketch used up."""
        # Listed by `materialize`, with which a step begins.
        assert self._inventory is not None
        for index, param, _ in self._inventory.owned:
            if (grad := param.grad) is not None and grad.is_sparse:
                raise ValueError(f"parameter {index} has a sparse gradient: build its embedding with sparse=False")
        if self._handle is not None:
            for group in self.param_groups:
                reads = group["algorithm"] == "mofasgd" and self._reads_gradient(group) is not None
                if reads and any(param in self._handle.windows for param in group["params"]):
                    self._refuse_full_gradient(group)
        return self._arranged()

    def _arranged(self) -> Arrangement:
        """Return how the parameters step together; raise ValueError if one cannot, before any gradient is read."""
        # As `materialize` has found them.
        assert self._pending is not None
        assert self._complete is not None
        complete, pending = self._complete, self._pending
        if self._arrangement is None or not self._arrangement.fits(complete, pending):
            self._arrangement = Arrangement(complete, self.state, pending)
        return self._arrangement

    def _context(self, gate: Tensor | None) -> Context:
        return Context(self.solver, self._displace, self.seed, self.stochastic_rounding, gate)

    def _plain(self, index: int, param: Tensor, group: Group, exchanged: Exchange) -> AdamWMember | None:
        """Return an AdamW parameter, or what this rank holds of it; None without a gradient."""
        own, grad = exchanged.plain.get(param) if exchanged.plain else None, param.grad
        if own is None and grad is None:
            return None
        state = self.state[param]
        rounding = Rounding.of(self.stochastic_rounding, self.seed, index, state["step"])
        if own is None:
            assert grad is not None
            return AdamWMember(param, grad, group, state, rounding)
        part = part_of(param)
        if part is not None:
            rounding = replace(rounding, offset=part.offset(param.shape))
        held = {key: local(value) for key, value in state.items()}
        return AdamWMember(local(param), own.grad, group, held, rounding, own.present, own.square)

    def _windows(self, members: Sequence[Member]) -> list[Window | None] | None:
        """Return the windows of members (None: it is not attached), None if no model is attached."""
        return None if self._handle is None else [self._handle.windows.get(member.param) for member in members]

    def _see_gradients(
        self, members: Sequence[Member], windows: Sequence[Window | None] | None, exchanged: Exchange
    ) -> bool:
        """Note what this step reads of the gradients of members of one group; return whether there is one.

        `windows` are theirs, as `_windows` returns them.
        """
        handle, some = self._handle, False
        for member, window in zip(members, repeat(None) if windows is None else windows):  # noqa: B905
            param = member.param
            if handle is not None and window is not None:
                member.gradient = handle.gradient(window)
            elif member.part is not None:
                member.gradient = exchanged.windows.get(param)
            else:
                grad = param.grad
                member.gradient = None if grad is None else DenseGradient(grad, member.shape)
            some = some or member.gradient is not None
        return some

    def _reads_gradient(self, group: Group) -> str | None:
        """Return what makes the step of a group of factored parameters read G itself, or None: its sketches do."""
        return f"complement={group['complement']}" if group["complement"] else None

    def abandon_window(self) -> None:
        """Forget gradients that an interrupted backward has left; what it has stepped already stays stepped."""
        self._taken = Taken()
        if self._handle is not None and self._handle.stepping:
            self._handle.renew()

    def _step_in_backward(self, index: int, param: Tensor, group: Group) -> None:
        """Take the step of one factored parameter by `param.grad`; `step()` counts it."""
        if self._pending is None:
            self.materialize()
        assert self._pending is not None
        pending = self._pending.get(param)
        context = self._context(None)
        member = Member(index, param, group, self.state[param], factored_shape(param, group)[0])
        window = self._average(param, group)
        self._see_gradients([member], None, Exchange())
        member.gradient = window or member.gradient
        bucket = Bucket([member])
        update = Start(bucket, pending, context) if pending else Update(bucket, context)
        observe_all([update])
        take_all([update], None)
        self._taken.squares.append(update.square_norms.sum())
        self._taken.finite.append(update.finite)
        self._taken.started += [param] if pending else []
        if window is not None:
            window.clear()

    def _average(self, param: Tensor, group: Group) -> Window | None:
        """Return the sketches over ranks of the gradient of a parameter that is stepped in backward, None for one rank.

        A step that reads the gradient itself has `p.grad` averaged, in full.
        """
        ranks = self._ranks if self._met else self._join(self._sharded())
        if ranks is None or self._handle is None or param.grad is None:
            return None
        if self._reads_gradient(group) is not None:
            ranks.sum([param.grad.div_(ranks.size)])
            return None
        window = self._handle.sum(param)
        ranks.sum(window.share(ranks.size)[0])
        return window

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_taken": Taken(), "_arrangement": None}

    @property
    def _displace(self) -> Displace | None:
        """What makes another step of the factors than this class does, or None."""
        return None

    def _settle(self, params: Sequence[Tensor]) -> None:
        """Note which matrices of `params` have started. Waits for the device if there are any."""
        assert self._pending is not None
        if params:
            # A new object: what was arranged by the old one no longer holds.
            started = set(params)
            kept = {param: places for param, places in self._pending.items() if param not in started}
            self._pending = kept | waiting({param: self.state[param] for param in params})
