"""The optimizers as the authors' NanoGPT code sets them up; `python -m mofasgd.paper` maps its keys on these rows.

Theirs train the blocks' matrices, and Adam beside them, always the same, embedding and head.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from mofasgd.app.config import Settings
from mofasgd.app.galore import GaLore
from mofasgd.app.model import GPT
from mofasgd.authors import AuthorsMFSGD

Build = Callable[[GPT, Settings, int], list[Optimizer]]

_REST: Settings = {"adamw_lr": 0.6, "head_lr": 0.008, "gradient_scale": 1.0}
_BETA: Settings = {"beta_warmup_steps": 300}
_ADAM: Settings = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8}


def _beside(matrices: Callable[[list[Tensor], Settings], Optimizer]) -> Build:
    """Return a builder of the optimizer `matrices` and of the authors' Adam for embedding and head."""

    def build(model: GPT, settings: Settings, seed: int) -> list[Optimizer]:
        rest = [
            {"params": [model.embedding.weight], "lr": settings["adamw_lr"]},
            {"params": [model.head.weight], "lr": settings["head_lr"]},
        ]
        return [matrices(list(model.blocks.parameters()), settings), Adam(rest, betas=(0.8, 0.95), fused=True)]

    return build


def _some(settings: Settings, *keys: str) -> Settings:
    return {key: settings[key] for key in keys}


def _mfsgd(params: list[Tensor], settings: Settings) -> Optimizer:
    same = _some(settings, "lr", "rank", "beta", "eta1", "eta2", "nesterov", "max_value")
    flags = _some(settings, "use_current_projection", "use_ones_for_nonzero_s")
    return AuthorsMFSGD(params, eps=settings["clip_eps"], **same, **flags)


def _muon(params: list[Tensor], settings: Settings) -> Optimizer:
    keys = _some(settings, "lr", "nesterov", "ns_steps")
    return Muon(params, momentum=settings["beta"], weight_decay=0.0, **keys)


def _adam(kind: type[Adam]) -> Callable[[list[Tensor], Settings], Optimizer]:
    return lambda params, settings: kind(params, fused=True, **_some(settings, "lr", "betas", "eps", "weight_decay"))


def _sgd(params: list[Tensor], settings: Settings) -> Optimizer:
    return SGD(params, momentum=settings["beta"], **_some(settings, "lr", "nesterov", "weight_decay"))


def _galore(params: list[Tensor], settings: Settings) -> Optimizer:
    group = {"params": params, **_some(settings, "rank", "gap", "scale")}
    return GaLore([group], **_some(settings, "lr", "betas", "eps", "weight_decay"))


ROWS: dict[str, tuple[Build, Settings, str]] = {
    "authors_mfsgd": (
        _beside(_mfsgd),
        {"lr": 0.05, "rank": 32, "beta": 0.85, "beta_start": 0.65, **_BETA, "eta1": 0.25, "eta2": 0.0}
        | {"clip_eps": 1e-10, "max_value": 5.0, "nesterov": False}
        | {"use_current_projection": True, "use_ones_for_nonzero_s": False, **_REST},
        "the authors' published step (mofasgd.paper.AuthorsMFSGD) and set-up, docs/coming-from-the-authors-code.md",
    ),
    "authors_muon": (
        _beside(_muon),
        {"lr": 0.05, "beta": 0.95, "beta_start": 0.85, **_BETA, "nesterov": True, "ns_steps": 5, **_REST},
        "Muon in the authors' set-up",
    ),
    "authors_adam": (_beside(_adam(Adam)), {**_ADAM, "weight_decay": 0.0, **_REST}, "Adam in the authors' set-up"),
    "authors_adamw": (
        _beside(_adam(AdamW)),
        {**_ADAM, "lr": 0.002, "betas": (0.8, 0.95), "weight_decay": 0.0, **_REST},
        "AdamW in the authors' set-up",
    ),
    "authors_sgd": (
        _beside(_sgd),
        {"lr": 0.05, "beta": 0.9, "beta_start": 0.85, "beta_warmup_steps": 0, "nesterov": True}
        | {"weight_decay": 0.0, **_REST},
        "SGD in the authors' set-up",
    ),
    "authors_galore": (
        _beside(_galore),
        {**_ADAM, "lr": 0.008, "rank": 32, "gap": 75, "scale": 0.25, "weight_decay": 0.0, **_REST},
        "GaLore in the authors' set-up",
    ),
}
"""Name -> builder, defaults (those of the authors' configuration files), note."""
