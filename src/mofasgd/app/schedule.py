"""Learning rate and momentum by step."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer

from mofasgd.app.baselines import MOMENTUM_KEYS
from mofasgd.app.config import Settings


def lr_multiplier(step: int, steps: int, warmup: float, cooldown: float) -> float:
    """Return the factor of every learning rate in step `step` (from 0): warm-up, stable, linear cooldown.

    `warmup` and `cooldown` are shares of `steps`; the first step has 1 / (warmup steps), the last 1 / (cooldown steps).
    """
    rising = (step + 1) / (warmup * steps) if warmup else 1.0
    falling = (steps - step) / (cooldown * steps) if cooldown else 1.0
    return min(1.0, rising, falling)


def momentum(step: int, settings: Settings) -> float:
    """Return the momentum in step `step`: linear from beta_start, beta from beta_warmup_steps on."""
    part = min(1.0, step / settings["beta_warmup_steps"]) if settings["beta_warmup_steps"] else 1.0
    return float(settings["beta_start"] * (1 - part) + settings["beta"] * part)


def apply_schedule(optimizers: Iterable[Optimizer], settings: Settings, multiplier: float, step: int) -> None:
    """Set lr and momentum of every group for `step`; each group keeps its own peak in `initial_lr`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * multiplier
            for key in MOMENTUM_KEYS:
                if key in group:
                    group[key] = momentum(step, settings)
