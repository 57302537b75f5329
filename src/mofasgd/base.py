"""Parameters, groups and state of the optimizer: all of it but its steps."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mofasgd.attach import Handle
from mofasgd.attach.window import Window
from mofasgd.buckets import Complete, Inventory, Owned
from mofasgd.dist.reduce import Ranks, Traffic, checksum
from mofasgd.dist.shards import group_of, is_sharded
from mofasgd.exchange import Exchange, ShardedGradient, exchange
from mofasgd.momentum import Factors
from mofasgd.options import Group, check_flag, check_number, check_parameters, check_whole, complete
from mofasgd.precision import true_float32
from mofasgd.state import factored_shape, new_adamw, new_factored, restored, waiting


def alone() -> dict[str, Any]:
    """Return what an optimizer knows of other ranks before it has met any."""
    return {"_ranks": None, "_traffic": Traffic(), "_met": False, "_check_every": 100, "_exchanged": 0}


class FactoredOptimizer(Optimizer):
    """What `MoFaSGD` keeps between steps, and how it is looked at, saved, copied and attached to a model.

    Attributes:
        state_dtype, stochastic_rounding, solver, seed: as in `MoFaSGD`, which sets them all.
    """

    state_dtype: torch.dtype
    stochastic_rounding: bool
    solver: str
    seed: int
    _factored_defaults: Group
    _adamw_defaults: Group
    # Host copy of which matrices wait for their start; None until it has been read from the state.
    _pending: dict[Tensor, list[int]] | None
    _norm: Tensor | None
    _nonfinite: Tensor | int
    _reported: int
    _handle: Handle | None
    _ranks: Ranks | None
    _traffic: Traffic
    _met: bool
    _check_every: int
    _exchanged: int
    # What has been listed, and the state that was found complete; copies begin without.
    _inventory: Inventory | None = None
    _complete: Complete | None = None

    def _step_in_backward(self, index: int, param: Tensor, group: Group) -> None:
        raise NotImplementedError

    def _reads_gradient(self, group: Group) -> str | None:
        """Return what makes the step of a group of factored parameters read G itself, or None: its sketches do."""
        raise NotImplementedError

    @property
    def max_grad_norm(self) -> float | None:
        """Norm to which the gradient of all parameters is clipped, or None."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None:
            check_number("max_grad_norm", value, 0.0, open_low=True)
        self._refuse_clipping(value, self._handle is not None and self._handle.stepping)
        self._max_grad_norm = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch; checks its keys, its values and that its parameters can be factored."""
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group should be a dict, not {type(param_group).__name__}")
        super().add_param_group(complete(param_group, self._factored_defaults, self._adamw_defaults))
        group = self.param_groups[-1]
        try:
            check_parameters(group)
        except BaseException:  # a warning may be an error
            self.param_groups.pop()
            raise
        self._pending = None
        # What each rank has drawn for itself becomes rank 0's.
        self._met = False

    def _parameters(self) -> list[Owned]:
        """Return (index as in state_dict, parameter, group) of all; the same list until they change."""
        if self._inventory is None or not self._inventory.holds(self.param_groups):
            self._inventory = Inventory(self.param_groups)
        return self._inventory.owned

    def materialize(self) -> None:
        """Make the state of every trainable parameter now, pending, without a gradient (for checkpoint libraries)."""
        owned = self._parameters()
        if self._complete is None or not self._complete.holds(owned, self.state):
            self._make(
                [(i, p, g) for i, p, g in owned if (p.requires_grad or p.grad is not None) and not self.state[p]]
            )
            if self._complete is not None and not self._complete.keeps(self.state):
                # Which matrices of another state are pending is not known.
                self._pending = None
            self._complete = Complete(owned, self.state)
        if self._pending is None:
            # What a library has replaced: torch's state_dict knows only what is in the groups.
            own = {param for _, param, _ in owned}
            for param in [param for param in self.state if param not in own]:
                del self.state[param]
            self._pending = waiting({p: s for p, s in self.state.items() if "initialized" in s})

    def _make(self, owned: Sequence[Owned]) -> None:
        """Make the state of parameters that have none."""
        if owned:
            self._pending = None
        kinds: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for index, param, group in owned:
            if group["algorithm"] == "adamw":
                self.state[param] = new_adamw(param, self.state_dtype)
                continue
            if param.dim() < 2:
                # A group with a vector in it is refused, so this has been put in place of a matrix since.
                raise ValueError(
                    f"parameter {index} of shape {tuple(param.shape)} was a matrix when the optimizer was made: "
                    "something (DeepSpeed ZeRO, FSDP1) has flattened it; use FSDP2 (fully_shard) or DDP instead"
                )
            kinds[id(group), param.dtype, factored_shape(param, group), param.device].append(param)
        # What will step together, in few launches.
        for (_, _, (shape, rank), device), params in kinds.items():
            self.state.update(
                zip(params, new_factored(len(params), shape, rank, self.state_dtype, device), strict=True)
            )

    def attach(
        self, model: nn.Module, mode: str = "auto", *, step_in_backward: bool = False, check_every: int = 100
    ) -> Handle:
        """Sketch the gradients of `model`'s factored parameters during backward and keep nothing else of them.

        `p.grad` stays None for these parameters, and `step()` takes the same step as without, up to rounding.
        Gradients accumulate over backward passes until `step()` or `zero_grad()` (the model's or the optimizer's).

        Args:
            model: holds every factored parameter; each of its trainable parameters is in some group.
            mode: "sketch" for linear and embedding layers whose gradient is then never computed; "release" sketches
                each gradient when it is complete and frees it; "auto" sketches where possible and releases elsewhere.
            step_in_backward: with mode="release", step each factored parameter as soon as its gradient is complete:
                what reads the full gradient works then (`complement`). One backward per step, no `max_grad_norm`.
            check_every: steps between two comparisons of the replicas' weights and state, with more than one rank.

        Returns:
            A handle: `detach()` (or leaving its `with` block) restores the model; `print(handle)` shows the modes.

        Raises:
            ValueError: if model or optimizer is attached already, a parameter is missing in either, a mode cannot
                serve a parameter, or an option needs a gradient that is not kept.
        """
        if self._handle is not None:
            raise ValueError("this optimizer is attached already: call detach() on its handle (opt.handle) first")
        check_flag("step_in_backward", step_in_backward)
        if step_in_backward and mode != "release":
            raise ValueError(f"step_in_backward=True steps by the full gradient: use mode='release', not {mode!r}")
        self._refuse_clipping(self.max_grad_norm, step_in_backward)
        check_whole("check_every", check_every, 1)
        self._met, self._check_every = False, check_every
        self._handle = Handle(model, self, mode, step_in_backward)
        return self._handle

    @property
    def handle(self) -> Handle | None:
        """What `attach` returned, or None while no model is attached."""
        return self._handle

    def _refuse_full_gradient(self, group: Group) -> None:
        reason = self._reads_gradient(group)
        if reason is not None:
            raise ValueError(
                f"{reason} needs the full gradient, which sketching never keeps: use attach(model, mode='release', "
                "step_in_backward=True), or do not attach"
            )

    def _refuse_clipping(self, value: float | None, stepping: bool) -> None:
        if value is not None and stepping:
            raise ValueError(
                f"max_grad_norm={value} needs the norm of all gradients before the first weight moves: drop it or "
                "step_in_backward"
            )

    @property
    def traffic(self) -> Traffic:
        """What this rank has given to all-reduces for the steps taken so far."""
        return self._traffic

    def _sharded(self) -> list[Tensor]:
        self._parameters()
        assert self._inventory is not None
        return self._inventory.sharded

    def _join(self, sharded: Sequence[Tensor]) -> Ranks | None:
        """Return the ranks that train with this one, None if there are none; `sharded` are the DTensors."""
        group = group_of(sharded)
        if group is None and self._handle is not None and self._handle.replicas is not None:
            group = self._handle.replicas.group
        if group is None:
            self._ranks = None
        elif self._ranks is None or self._ranks.group is not group:
            self._ranks = Ranks(group, self._traffic)
        return self._ranks

    def _exchange(self) -> Exchange:
        """Sum over ranks what this step reads of gradients."""
        # Listed by `materialize`, with which a step begins.
        assert self._inventory is not None
        sharded = self._inventory.sharded
        ranks = self._join(sharded)
        if ranks is None and not sharded:
            return Exchange()
        if self._handle is not None:
            # A rank to which no batch came has not called the model since parameters were frozen or added.
            self._handle.bind()
        self._meet()
        windows: dict[Tensor, Window] = {}
        waits, adamw = self._waiting(), []
        for index, param, group in self._parameters():
            if group["algorithm"] == "adamw":
                adamw.append(param)
            elif self._handle is not None and param in self._handle.windows:
                windows[param] = self._handle.sum(param)
            elif is_sharded(param) and param.grad is not None:
                place = (self.seed, index, param, group, self.state[param])
                windows[param] = ShardedGradient(*place, waits.get(param, []))
        return exchange(windows, adamw, self._handle, ranks)

    def _replicated(self) -> list[Tensor]:
        """Return the state and, attached, the weights that are to be alike on all ranks, in an order alike as well."""
        whole = [] if self._handle is None else self._handle.whole()
        # Not attached, replicated weights are kept alike by DDP or by the user.
        params = [p for _, p, _ in self._parameters() if self._handle is not None or is_sharded(p)]
        entries = [self.state[p][key] for p in params for key in sorted(self.state.get(p, {}))]
        return whole + [entry for entry in entries if not is_sharded(entry)]

    def _meet(self) -> None:
        """Begin with rank 0's weights, as DDP does, and with its state."""
        if self._met:
            return
        ranks = self._join(self._sharded())
        if ranks is None:
            return
        self._met = True
        self.materialize()
        if self._handle is not None:
            ranks.broadcast([*self._handle.whole(), *self._handle.buffers()])
        self._compare(ranks)

    def _compare(self, ranks: Ranks) -> None:
        """Give all ranks what rank 0 has, and warn, if weights or state differ. Waits for the device."""
        tensors = self._replicated()
        if not tensors or bool(ranks.agree(checksum(tensors))):
            return
        ranks.broadcast(tensors)
        self._pending = None
        if self._handle is not None:
            self._handle.renew()
        if ranks.group.rank() == 0:
            warnings.warn("ranks held different weights or optimizer state: all have rank 0's now", stacklevel=3)

    def _compare_often(self) -> None:
        self._exchanged += 1
        if self._ranks is not None and self._exchanged % self._check_every == 0:
            self._compare(self._ranks)

    def _detached(self) -> None:
        self._handle = None

    def _waiting(self) -> dict[Tensor, list[int]]:
        self.materialize()
        assert self._pending is not None
        return self._pending

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients as in torch, and what attached layers have sketched since the last step."""
        super().zero_grad(set_to_none)
        if self._handle is not None:
            self._handle.clear()

    def grad_norm(self) -> Tensor:
        """Return the norm of the gradient that the last `step` saw, before clipping: 0-dim float64, on its device.

        Factored parameters count with |Ghat|, or |M_1| in their first window; non-finite ones are left out.
        """
        return torch.zeros((), dtype=torch.float64) if self._norm is None else self._norm.clone()

    @property
    def nonfinite_steps(self) -> int:
        """Number of steps in which some parameter's gradient was not finite; GradScaler's skipped ones do not count.

        Reading it waits for the device, and warns if the number has grown since it was last read.
        """
        count = self._nonfinite = int(self._nonfinite)
        if count > self._reported:
            news = f"{count - self._reported} steps had a gradient that was not finite"
            warnings.warn(f"{news}; the parameters concerned were left as they were", stacklevel=2)
        self._reported = count
        return count

    def factors(self, param: Tensor) -> Factors:
        """Return (U, s, V) of a factored parameter: copies in `state_dtype`; zeros while it is pending.

        Shapes (*lead, m, r), (*lead, r), (*lead, n, r), `lead` being the stacked dimensions.
        """
        for index, own, group in self._parameters():
            if own is param and group["algorithm"] == "mofasgd":
                if not self.state[param]:
                    self._make([(index, param, group)])
                return Factors(*(self.state[param][key].clone() for key in Factors._fields))
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has no factors: it is not in a group with algorithm='mofasgd'"
        )

    def momentum(self, param: Tensor) -> Tensor:
        """Return the dense first moment M of a factored parameter, in its shape and `state_dtype` (for study)."""
        U, s, V = self.factors(param)
        with true_float32(U.device.type):
            return ((U * s[..., None, :]) @ V.mT).reshape(param.shape)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state_dict and `nonfinite_steps`, an int. Tensors and numbers only.

        The count is in the groups as well: `torch.distributed.checkpoint` keeps nothing else but them and the state.
        """
        count = self.nonfinite_steps
        for group in self.param_groups:
            group["nonfinite_steps"] = count
        return {**super().state_dict(), "nonfinite_steps": count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of a state_dict; floating state stays in `state_dtype`, whatever the dtype of the weights.

        Raises:
            ValueError: if it does not fit this optimizer; then nothing has changed.
        """
        if self._handle is not None and not self._handle.stepping and isinstance(state_dict, dict):
            for group in state_dict.get("param_groups", []):
                if group.get("algorithm") == "mofasgd":
                    self._refuse_full_gradient(group)
        with restored(self, self.state_dtype) as loaded:
            super().load_state_dict(state_dict)
        in_groups = max(group.get("nonfinite_steps", 0) for group in self.param_groups)
        nonfinite = int(loaded.get("nonfinite_steps", in_groups))
        self._met = False
        self._nonfinite = self._reported = nonfinite
        self._pending = None
        if self._handle is not None:
            self._handle.renew()

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only groups and state; copies and pickles need the settings too.
        settings = "_max_grad_norm state_dtype stochastic_rounding solver seed _factored_defaults _adamw_defaults"
        kept = {key: self.__dict__[key] for key in (*settings.split(), "_nonfinite", "_reported", "_norm")}
        parent: dict[str, Any] = super().__getstate__()
        # Each entry is a view of a stack, all of which a pickle would hold for it.
        state = {p: {k: v.clone() for k, v in entry.items()} for p, entry in self.state.items()}
        # A copy is not attached: the model's layers sketch for the original.
        return {**parent, "state": defaultdict(dict, state), **kept, "_pending": None, "_handle": None, **alone()}
