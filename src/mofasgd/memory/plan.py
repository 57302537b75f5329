"""What training would take of a GPU's memory, by parts, before anything of the model's size is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mofasgd.memory.methods import METHODS, first_window, prepare, resolve
from mofasgd.memory.rehearse import blank, build, faked, knowable, ready, rehearse, tokens
from mofasgd.options import check_choice, check_flag, check_whole

PRECISIONS = ("bf16-true", "bf16-mixed", "float32")

_PARTS = ("weights", "gradients", "optimizer_state", "sketches", "activations", "temporaries")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training holds, as `mofasgd profile` counts them. `str()` is a table.

    The parts are the most that each holds at any time, `total` is the most that all hold together: less than their
    sum, since gradients come while activations go.

    Attributes:
        method: what trains.
        weights: parameters and buffers.
        gradients: what is in `p.grad` when a step begins.
        optimizer_state: of the method.
        sketches: what an attached MoFaSGD holds in place of gradients.
        activations: what forward leaves for backward.
        temporaries: all that lives within forward, backward or step only.
        total: the peak, of all tensors; not counted: what kernels need within, fragments of the allocator, CUDA.
        at_peak: part -> its bytes at the peak, which add up to `total`.
    """

    method: str
    weights: int
    gradients: int
    optimizer_state: int
    sketches: int
    activations: int
    temporaries: int
    total: int
    at_peak: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return method, parts, total and at_peak, for JSON; bytes."""
        parts = {part: getattr(self, part) for part in _PARTS}
        return {"method": self.method, **parts, "total": self.total, "at_peak": dict(self.at_peak)}

    def __str__(self) -> str:
        lines = [f"{self.method + ', GB (2^30 bytes)':24s}{'at most':>10s}{'at the peak':>14s}"]
        for part in _PARTS:
            held = getattr(self, part) / 2**30, self.at_peak[part] / 2**30
            lines.append(f"{part.replace('_', ' '):24s}{held[0]:>10.3f}{held[1]:>14.3f}")
        return "\n".join([*lines, f"{'total':24s}{'':10s}{self.total / 2**30:>14.3f}"])


def estimate(
    model_or_config: Any,
    method: str = "mofasgd",
    *,
    batch: int = 1,
    seq: int = 512,
    rank: int | None = None,
    attach: str | None = None,
    complement: float | None = None,
    factor: Sequence[str] | None = None,
    freeze: Sequence[str] | None = None,
    checkpointing: bool = False,
    precision: str | None = None,
    accumulate: bool = False,
    inputs: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> MemoryPlan:
    """Return what a step of training would hold, in bytes, without a tensor of the model's size.

    Forward and backward run on tensors that have shapes only; state, and what a step makes, follow from shapes.

    Args:
        model_or_config: a module, which stays as it is, or a config of transformers.
        method: "mofasgd", "adamw", "lora", "galore", "muon" or "adamw8bit", with the optimizers of
            `mofasgd finetune`. "adamw" of a model with adapters is LoRA with these adapters.
        batch: rows of one forward and backward.
        seq: tokens of a row.
        rank: of mofasgd, galore and lora; default 32.
        attach: of mofasgd: "auto" (the default), "sketch", "release" or "none" (whole gradients).
        complement: of mofasgd; not 0 needs attach "release" or "none".
        factor: of mofasgd: name patterns of embeddings or heads that it factors too.
        freeze: of all but lora: name patterns of parameters that are not trained.
        checkpointing: keep the layers' inputs only and compute the rest again.
        precision: "bf16-true" (bfloat16 weights; default for a config), "bf16-mixed" (float32 weights, bfloat16
            products) or "float32"; None for a module: its own dtypes, without autocast.
        accumulate: several backwards make a step: gradients are there while activations are.
        inputs: what a module's forward takes, a tensor, tuple or dict, of which shapes and dtypes count, in place of
            token ids (batch, seq) or, for a module that begins with a linear layer, its inputs (batch, seq, n).
        loss: of forward's output; default: its `loss`, or else cross-entropy or mean square.

    Raises:
        ValueError: for an unknown method, a setting that has no effect for it, a value out of range, or a model
            whose forward fails or depends on the numbers in its tensors.
    """
    check_whole("batch", batch, 1)
    check_whole("seq", seq, 1)
    check_flag("checkpointing", checkpointing)
    check_flag("accumulate", accumulate)
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
    options = {"rank": rank, "attach": attach, "complement": complement, "factor": factor, "freeze": freeze}
    settings = resolve(method, {key: value for key, value in options.items() if value is not None})
    if accumulate and settings.get("complement") and settings["attach"] == "release":
        raise ValueError("accumulate: a complement with attach=release takes one backward a step; use attach=none")
    mixed = precision == "bf16-mixed"
    model = prepare(_model(model_or_config, precision), method, settings)
    with FakeTensorMode(allow_non_fake_inputs=True), knowable(model):
        model = blank(model, "cpu")
        ready(model, checkpointing)
        optimizer = METHODS[method].build(model, settings | {"mixed": mixed})
        called = tokens(model, batch, seq) if inputs is None else faked(inputs)
        found = rehearse(model, optimizer, called, loss, backwards=1 + accumulate, autocast=mixed)
        return _plan(method, found, METHODS[method].step(optimizer, settings), *first_window(optimizer))


def _model(model_or_config: Any, precision: str | None) -> nn.Module:
    """Return the model on the meta device."""
    if isinstance(model_or_config, nn.Module):
        dtypes = {None: None, "bf16-true": torch.bfloat16}
        return blank(model_or_config, "meta", dtypes.get(precision, torch.float32))
    if not hasattr(model_or_config, "to_dict"):
        raise ValueError(
            f"a {type(model_or_config).__name__} is neither a module nor a config of transformers: load the config "
            "with transformers.AutoConfig.from_pretrained(name)"
        )
    return build(model_or_config, torch.bfloat16 if precision in (None, "bf16-true") else torch.float32)


def _plan(method: str, found: Any, later: int, sketches: int, first: int) -> MemoryPlan:
    """Return the plan of what was recorded, and of the steps.

    Args:
        method: its name.
        found: of forward and backward.
        later: bytes that a step makes.
        sketches, first: bytes of the sketches of the first window, and what the first step makes.
    """
    held = found.after
    steps = [held | {"temporaries": held["temporaries"] + later}]
    steps.append(held | {"sketches": max(sketches, held["sketches"]), "temporaries": held["temporaries"] + first})
    moments = [_named(moment) for moment in (found.peak, *steps)]
    most = _named(found.most)
    peak = max(moments, key=lambda moment: sum(moment.values()))
    for moment in moments:
        most = {part: max(size, moment[part]) for part, size in most.items()}
    return MemoryPlan(method=method, **most, total=sum(peak.values()), at_peak=peak)


def _named(held: dict[str, int]) -> dict[str, int]:
    return {part: held[part.replace("_", " ")] for part in _PARTS}


def largest_batch(total: Callable[[int], int], limit: int, most: int = 1 << 20) -> int:
    """Return the largest batch of at most `most` whose `total` bytes are within `limit`; 0: not even one row.

    Args:
        total: batch to bytes; grows, about linearly once activations dominate.
        limit: bytes.
        most: where to stop.
    """
    fits, below = 1, total(1)
    if below > limit:
        return 0
    fails, above, probe, halve = most + 1, None, 2, False
    while fails - fits > 1:
        size = total(probe)
        if size <= limit:
            slope, fits, below = (size - below) / (probe - fits), probe, size
            # Beyond what a straight line would allow, unless it bends down.
            ahead = int((limit - below) / slope) if slope > 0 else fits
        else:
            fails, above, ahead = probe, size, 0
        if above is not None:
            ahead = int((limit - below) / (above - below) * (fails - fits))
            ahead, halve = ((fails - fits) // 2 if halve else ahead), not halve
        probe = min(max(fits + 1, fits + ahead), fails - 1)
    return fits
