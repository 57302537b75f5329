"""The table of fine-tuning methods: how each changes the model, makes its optimizer, and its default settings."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from mofasgd.app.baselines import fill
from mofasgd.app.config import Settings
from mofasgd.app.galore import GaLore
from mofasgd.app.tune.config import MethodConfig
from mofasgd.app.tune.joint import Joint
from mofasgd.groups import split
from mofasgd.hf import trainer_kwargs
from mofasgd.options import check_choice

Build = Callable[[nn.Module, Settings], Optimizer]

_ADAM: Settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0}
_FULL: Settings = {**_ADAM, "freeze": []}
_EIGHT_BIT = (("torchao.optim", "torchao"), ("bitsandbytes.optim", "bitsandbytes"))
"""Module with AdamW8bit -> package that has it."""


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        build: model and settings to the optimizer; None: MoFaSGD's own factory.
        defaults: every setting that the method has.
        note: what it is.
    """

    build: Build | None
    defaults: Settings
    note: str


def _decays(params: list[Tensor], settings: Settings) -> list[dict[str, Any]]:
    """Return groups of which only weights of two or more dimensions decay."""
    parts = ([p for p in params if p.ndim >= 2], settings["weight_decay"]), ([p for p in params if p.ndim < 2], 0.0)
    return [{"params": some, "weight_decay": decay} for some, decay in parts if some]


def _trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _adam_keys(settings: Settings) -> Settings:
    return {key: settings[key] for key in ("betas", "eps")}


def _adamw(model: nn.Module, settings: Settings) -> Optimizer:
    return AdamW(_decays(_trainable(model), settings), lr=settings["lr"], fused=True, **_adam_keys(settings))


def _adamw8bit(model: nn.Module, settings: Settings) -> Optimizer:
    kind = eight_bit_class()
    optimizer: Optimizer = kind(_decays(_trainable(model), settings), lr=settings["lr"], **_adam_keys(settings))
    return optimizer


def eight_bit_class() -> Any:
    """Return AdamW8bit of torchao or bitsandbytes.

    Raises:
        ValueError: if neither is installed, naming the command that installs one.
    """
    for module, package in _EIGHT_BIT:
        if importlib.util.find_spec(package) is not None:
            return importlib.import_module(module).AdamW8bit
    raise ValueError("method=adamw8bit needs torchao or bitsandbytes: pip install torchao")


def _rest(params: list[Tensor], settings: Settings) -> Optimizer:
    return AdamW(_decays(params, settings), lr=settings["adamw_lr"], fused=True, **_adam_keys(settings))


def _muon(model: nn.Module, settings: Settings) -> Optimizer:
    # As at a low rank: the head of a few classes is AdamW's.
    matrices, rest = split(model, rank=8)
    muon = Muon(matrices, lr=settings["lr"], momentum=settings["beta"], weight_decay=settings["weight_decay"])
    return Joint([muon, _rest(rest, settings)])


def _galore(model: nn.Module, settings: Settings) -> Optimizer:
    matrices, rest = split(model, settings["rank"])
    own = {key: settings[key] for key in ("rank", "gap", "scale", "weight_decay")}
    groups = [{"params": matrices, **own}]
    groups += [group | {"lr": settings["adamw_lr"]} for group in _decays(rest, settings)]
    return GaLore(groups, lr=settings["lr"], **_adam_keys(settings))


# Rates, and beta of mofasgd: the best of those tried with SmolLM2-135M on GSM8K (docs/results/finetune_gsm8k.json).
METHODS: dict[str, Method] = {
    "mofasgd": Method(
        None,
        {"lr": 1.6e-2, "adamw_lr": 3e-4, "rank": 32, "beta": 0.8, **_FULL, "max_grad_norm": 0.0, "complement": 0.0}
        | {"lr_scale": "spectral", "attach": "auto", "factor": []},
        "this package, attached: gradients are sketched in backward and never kept",
    ),
    "adamw": Method(_adamw, {"lr": 3e-4, **_FULL}, "torch.optim.AdamW of all parameters"),
    "lora": Method(_adamw, {"lr": 3e-3, "rank": 32, "alpha": 64.0, **_ADAM}, "PEFT's LoRA on all linear layers, AdamW"),
    "galore": Method(
        _galore,
        {"lr": 6e-3, "adamw_lr": 1e-4, "rank": 32, "gap": 200, "scale": 0.25, **_FULL},
        "mofasgd.app.galore on the matrices, AdamW for the rest",
    ),
    "muon": Method(
        _muon,
        {"lr": 3e-3, "adamw_lr": 3e-4, "beta": 0.95, **_FULL, "max_grad_norm": 0.0},
        "torch.optim.Muon on the matrices, AdamW for the rest",
    ),
    "adamw8bit": Method(_adamw8bit, {"lr": 3e-4, **_FULL}, "AdamW with 8-bit moments, of torchao or bitsandbytes"),
}


def resolve(config: MethodConfig) -> Settings:
    """Return all settings of the method, those left out with its defaults.

    Raises:
        ValueError: for an unknown method, a setting that it does not have, or a value out of range.
    """
    check_choice("method", config.method, tuple(METHODS))
    keys = [field.name for field in dataclasses.fields(MethodConfig) if field.name != "method"]
    given = {key: value for key in keys if (value := getattr(config, key)) is not None}
    if config.method == "adamw8bit":
        eight_bit_class()
    settings = fill({name: method.defaults for name, method in METHODS.items()}, config.method, given)
    if settings.get("complement") and settings["attach"] not in ("release", "none"):
        raise ValueError(
            f"complement={settings['complement']:g} reads whole gradients: add --attach release, which steps each "
            "weight while its gradient exists, or --attach none"
        )
    return settings


class TableFactory:
    """Makes the optimizer of a table row, in the form that Trainer's `optimizer_cls_and_kwargs` takes."""

    def __call__(self, opt_model: nn.Module, *, method: str, settings: Settings) -> Optimizer:
        """Return the optimizer of all trainable parameters of `opt_model`."""
        build = METHODS[method].build
        assert build is not None
        return build(opt_model, settings)


def kwargs_for_trainer(args: Any, method: str, settings: Settings) -> dict[str, Any]:
    """Return the arguments of a Trainer with TrainingArguments `args` that make it train with `method`.

    Its `callbacks` are a list to which more may be appended. `args` must have `arguments(settings)` in it.
    """
    if method != "mofasgd":
        return {"optimizer_cls_and_kwargs": (TableFactory, {"method": method, "settings": settings}), "callbacks": []}
    own = {
        key: settings[key] for key in ("lr", "adamw_lr", "rank", "beta", "complement", "lr_scale", "attach", "factor")
    }
    return trainer_kwargs(args, **own)


def arguments(settings: Settings) -> dict[str, Any]:
    """Return what of `settings` belongs into TrainingArguments."""
    beta1, beta2 = settings["betas"]
    adam = {"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": settings["eps"]}
    return {**adam, "weight_decay": settings["weight_decay"], "max_grad_norm": settings["max_grad_norm"]}


def table() -> str:
    """Return the methods with their settings, one a paragraph."""
    lines = ["methods and the defaults of their settings:"]
    for name, method in METHODS.items():
        settings = ", ".join(f"{key} {value}" for key, value in method.defaults.items())
        lines.append(f"  {name}: {method.note}\n{textwrap.indent(textwrap.fill(settings, 90), ' ' * 6)}")
    return "\n".join(lines)
