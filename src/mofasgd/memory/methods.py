"""What each method of training holds, by shapes alone: its optimizer's state, and what a step makes beside it.

The names, and the settings that change memory, are those of `mofasgd finetune`; a test holds both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mofasgd.gradient import FirstWindow
from mofasgd.groups import freeze, param_groups, split
from mofasgd.optimizer import MoFaSGD
from mofasgd.options import Group, check_choice, check_number, check_whole
from mofasgd.start import TOGETHER
from mofasgd.state import factored_shape

Settings = dict[str, Any]

Entries = list[tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes of one parameter's state."""

MODES = ("auto", "sketch", "release", "none")
_COUNTER: tuple[tuple[int, ...], torch.dtype] = ((), torch.float32)
_BLOCK = 256
"""Elements of an 8-bit moment that share a scale."""


class Still(Optimizer):
    """Holds the state that an optimizer would have, and takes no step.

    Args:
        states: parameter -> its state.
    """

    def __init__(self, states: dict[Tensor, Entries]) -> None:
        super().__init__(list(states), {})
        for param, entries in states.items():
            made = [torch.empty(shape, dtype=dtype, device=param.device) for shape, dtype in entries]
            self.state[param] = dict(zip(map(str, range(len(made))), made, strict=True))

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do nothing; hooks are called."""


class StillMoFaSGD(MoFaSGD):
    """MoFaSGD with all momenta there, which takes no step: attached, its layers sketch as they will in training."""

    def materialize(self) -> None:
        """Make the state, and know without reading it that nothing is pending."""
        if self._pending is None:
            self._make([owned for owned in self._parameters() if not self.state[owned[1]]])
            self._pending = {}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do nothing; hooks are called."""

    def _step_in_backward(self, index: int, param: Tensor, group: Group) -> None:
        """Hold for a moment what the step of one parameter makes."""
        shape, rank = factored_shape(param, group)
        param.new_empty(int(_LATER * shape.batch * (shape.m + shape.n) * rank), dtype=self.state_dtype)


@dataclass(frozen=True)
class Method:
    """One way of training.

    Attributes:
        defaults: the settings that change its memory.
        build: model, with what it trains, and settings to the optimizer.
        step: optimizer and settings to the most bytes that a later step makes beside all else.
    """

    defaults: Settings
    build: Callable[[nn.Module, Settings], Optimizer]
    step: Callable[[Optimizer, Settings], int] = lambda optimizer, settings: 0


def prepare(model: nn.Module, method: str, settings: Settings) -> nn.Module:
    """Return `model`, on the meta device, with only that trainable which the method trains; lora: with adapters.

    Raises:
        ValueError: if PEFT is missing, or a pattern matches nothing.
    """
    if method != "lora":
        freeze(model, settings["freeze"])
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ValueError("method=lora needs PEFT: pip install peft") from error
    targets: Any = "all-linear"
    if not hasattr(model, "config"):
        # PEFT takes those by name only of a model that it does not know.
        targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    whole = "SequenceClassification" in type(model).__name__
    config = LoraConfig(r=settings["rank"], target_modules=targets, task_type="SEQ_CLS" if whole else None)
    found: Any = model
    with torch.device("meta"):
        found = get_peft_model(found, config)
    result: nn.Module = found
    return result


def _trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _adam_entries(param: Tensor) -> Entries:
    return [(tuple(param.shape), param.dtype)] * 2 + [_COUNTER]


def _eight_bit_entries(param: Tensor) -> Entries:
    # As torchao and bitsandbytes: small parameters keep whole moments; a table of 256 values for each moment.
    if param.numel() < 4096 or param.numel() % _BLOCK:
        return _adam_entries(param)
    moment: Entries = [((param.numel(),), torch.uint8), ((param.numel() // _BLOCK,), torch.float32)]
    return [*moment, ((256,), torch.float32)] * 2 + [_COUNTER]


def _galore_entries(rank: int) -> Callable[[Tensor], Entries]:
    def entries(param: Tensor) -> Entries:
        m, n = param.shape
        basis, low = ((n, rank), (m, rank)) if m >= n else ((m, rank), (rank, n))
        return [(shape, param.dtype) for shape in (basis, low, low)] + [_COUNTER]

    return entries


def _muon_entries(param: Tensor) -> Entries:
    return [(tuple(param.shape), param.dtype)]


def _still(params: Iterable[Tensor], entries: Callable[[Tensor], Entries]) -> dict[Tensor, Entries]:
    return {param: entries(param) for param in params}


def _mofasgd(model: nn.Module, settings: Settings) -> Optimizer:
    if not settings["factor"]:
        split(model, settings["rank"])
    complement, mode = settings["complement"], settings["attach"]
    groups = param_groups(model, rank=settings["rank"], factor=settings["factor"], complement=complement)
    optimizer = StillMoFaSGD(groups)
    optimizer.materialize()
    if mode != "none":
        _attach(model, optimizer, mode, stepping=bool(complement), mixed=settings["mixed"])
    return optimizer


def _attach(model: nn.Module, optimizer: MoFaSGD, mode: str, *, stepping: bool, mixed: bool) -> None:
    """Attach, with the casts of factors that layers have from their second window on."""
    handle = optimizer.attach(model, mode, step_in_backward=stepping)
    for row in handle.rows:
        window = handle._windows.get(row.param)
        dtype = torch.bfloat16 if mixed else row.param.dtype
        if window is not None and row.layers and dtype is not optimizer.state_dtype:
            window.cast(dtype)


def _all(entries: Callable[[Tensor], Entries]) -> Callable[[nn.Module, Settings], Optimizer]:
    def build(model: nn.Module, settings: Settings) -> Optimizer:
        return Still(_still(_trainable(model), entries))

    return build


def _galore(model: nn.Module, settings: Settings) -> Optimizer:
    matrices, rest = split(model, settings["rank"])
    states = _still(matrices, _galore_entries(settings["rank"])) | _still(rest, _adam_entries)
    return Still(states)


def _muon(model: nn.Module, settings: Settings) -> Optimizer:
    # As in `mofasgd finetune`.
    matrices, rest = split(model, rank=8)
    return Still(_still(matrices, _muon_entries) | _still(rest, _adam_entries))


# Bytes of all factors (float32) that a step holds for a moment beside them, measured on CUDA (docs/finetuning.md).
_LATER = 2.25
_FIRST = 1


def factor_bytes(optimizer: MoFaSGD) -> int:
    """Return the bytes of U and V of all matrices."""
    entries = [entry for state in optimizer.state.values() for key, entry in state.items() if key in ("U", "V")]
    return sum(entry.nbytes for entry in entries)


def _mofasgd_step(optimizer: Optimizer, settings: Settings) -> int:
    assert isinstance(optimizer, MoFaSGD)
    if optimizer.handle is not None and optimizer.handle.stepping:
        return 0
    return int(_LATER * factor_bytes(optimizer))


def first_window(optimizer: Optimizer) -> tuple[int, int]:
    """Return the bytes of the sketches that the first step finds, and of what it makes beside them; 0, 0: as later.

    Without a handle there are no sketches before the step.
    """
    if not isinstance(optimizer, MoFaSGD) or (optimizer.handle is not None and optimizer.handle.stepping):
        return 0, 0
    sketches = 0
    for index, param, group in optimizer._parameters():
        if group["algorithm"] == "mofasgd":
            shape, rank = factored_shape(param, group)
            first = FirstWindow(optimizer.seed, index, shape, rank, optimizer.state_dtype)
            right, left = first.widths
            each = shape.m * shape.n if first.dense else shape.m * right + shape.n * left
            sketches += shape.batch * each * first.dtype.itemsize
    # The new momenta, and pieces of the sketches, of their Gram matrices' operands (float64) and of test matrices.
    made = _FIRST * factor_bytes(optimizer) + 3 * min(4 * TOGETHER, sketches)
    return (sketches, made) if optimizer.handle is not None else (0, made)


def _largest(optimizer: Optimizer) -> Tensor:
    return max((p for p in optimizer.state if p.ndim == 2), key=Tensor.numel)


def _galore_step(optimizer: Optimizer, settings: Settings) -> int:
    # The SVD of a float32 copy, every `gap` steps; what the solver needs within is not counted.
    param = _largest(optimizer)
    m, n = param.shape
    return 4 * (m * n + (m + n) * min(m, n))


def _muon_step(optimizer: Optimizer, settings: Settings) -> int:
    # Newton-Schulz in bfloat16: the iterate, the next one, and two Gram matrices.
    param = _largest(optimizer)
    m, n = param.shape
    return m * n * param.element_size() + 2 * (2 * m * n + 2 * min(m, n) ** 2)


_FULL: Settings = {"freeze": ()}

METHODS: dict[str, Method] = {
    "mofasgd": Method(
        {"rank": 32, "attach": "auto", "complement": 0.0, "factor": (), **_FULL}, _mofasgd, _mofasgd_step
    ),
    "adamw": Method(_FULL, _all(_adam_entries)),
    "lora": Method({"rank": 32}, _all(_adam_entries)),
    "galore": Method({"rank": 32, **_FULL}, _galore, _galore_step),
    "muon": Method(_FULL, _muon, _muon_step),
    "adamw8bit": Method(_FULL, _all(_eight_bit_entries)),
}


def settings_of(method: str) -> Settings:
    """Return the settings that change the memory of a method, with their defaults; ValueError for an unknown one."""
    check_choice("method", method, tuple(METHODS))
    return dict(METHODS[method].defaults)


def resolve(method: str, given: Settings) -> Settings:
    """Return all settings of a method, those not in `given` with its defaults.

    Raises:
        ValueError: for an unknown method, a setting that has no effect on its memory, or a value out of range.
    """
    check_choice("method", method, tuple(METHODS))
    defaults = METHODS[method].defaults
    for key, value in given.items():
        if key not in defaults:
            owners = ", ".join(name for name, other in METHODS.items() if key in other.defaults)
            raise ValueError(f"{key}={value!r} has no effect for method={method}: it is a setting of {owners}")
    settings = defaults | given
    if "rank" in settings:
        check_whole("rank", settings["rank"], 1)
    if "attach" in settings:
        check_choice("attach", settings["attach"], MODES)
        check_number("complement", settings["complement"], 0.0)
        if settings["complement"] and settings["attach"] not in ("release", "none"):
            raise ValueError(
                f"complement={settings['complement']:g} reads whole gradients: it needs attach=release or attach=none"
            )
    return settings
