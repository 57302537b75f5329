"""The table of optimizers: what each is built from and its default settings."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from mofasgd.app.authors import ROWS, Build
from mofasgd.app.config import OptimizerConfig, Settings
from mofasgd.app.galore import GaLore
from mofasgd.app.model import GPT
from mofasgd.app.row_norm import RowNormSGD
from mofasgd.groups import param_groups
from mofasgd.optimizer import MoFaSGD
from mofasgd.options import check_choice, check_number, check_whole

MOMENTUM_KEYS = ("beta", "momentum")
"""Names that optimizers have for `OptimizerConfig.beta` in their groups."""

_ADAM: Settings = {"betas": (0.9, 0.95), "eps": 1e-8}
_MOMENTUM: Settings = {"beta": 0.95, "beta_start": 0.85, "beta_warmup_steps": 0}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        build: model, settings and seed to the optimizers that train it together.
        defaults: every setting that the method has. A `lr` of the matrices was found on a 12-layer GPT of width 768.
        note: what it is, and what of it differs from its source.
    """

    build: Build
    defaults: Settings
    note: str


def _split(model: GPT) -> tuple[list[Tensor], list[Tensor]]:
    """Return the blocks' matrices, and embedding and head."""
    return list(model.blocks.parameters()), [model.embedding.weight, model.head.weight]


def _adam_keys(settings: Settings) -> Settings:
    return {key: settings[key] for key in ("betas", "eps", "weight_decay")}


def _rest(params: list[Tensor], settings: Settings) -> Optimizer:
    return AdamW(params, lr=settings["adamw_lr"], fused=True, **_adam_keys(settings))


def _adam(kind: type[Adam]) -> Build:
    def build(model: GPT, settings: Settings, seed: int) -> list[Optimizer]:
        matrices, rest = _split(model)
        groups = [{"params": matrices}, {"params": rest, "lr": settings["adamw_lr"]}]
        return [kind(groups, lr=settings["lr"], fused=True, **_adam_keys(settings))]

    return build


def _sgd(model: GPT, settings: Settings, seed: int) -> list[Optimizer]:
    decay = settings["weight_decay"]
    return [SGD(model.parameters(), lr=settings["lr"], momentum=settings["beta"], weight_decay=decay)]


def _muon(model: GPT, settings: Settings, seed: int) -> list[Optimizer]:
    matrices, rest = _split(model)
    muon = Muon(matrices, lr=settings["lr"], momentum=settings["beta"], weight_decay=settings["weight_decay"])
    return [muon, _rest(rest, settings)]


def _galore(model: GPT, settings: Settings, seed: int) -> list[Optimizer]:
    matrices, rest = _split(model)
    own = {key: settings[key] for key in ("rank", "gap", "scale")}
    if settings["rank"] > min(min(matrix.shape) for matrix in matrices):
        raise ValueError(f"optimizer.rank={settings['rank']} is larger than the model's width: lower it")
    groups = [{"params": matrices, **own}, {"params": rest, "lr": settings["adamw_lr"]}]
    return [GaLore(groups, lr=settings["lr"], **_adam_keys(settings))]


def _row_norm(model: GPT, settings: Settings, seed: int) -> list[Optimizer]:
    matrices, rest = _split(model)
    own = RowNormSGD(matrices, lr=settings["lr"], weight_decay=settings["weight_decay"])
    return [own, _rest(rest, settings)]


def _mofasgd(model: GPT, settings: Settings, seed: int) -> list[Optimizer]:
    keys = ("rank", "lr", "adamw_lr", "weight_decay", "beta", "complement", "lr_scale")
    groups = param_groups(model, head=model.head, **{key: settings[key] for key in keys})
    if all(group["algorithm"] != "mofasgd" for group in groups):
        width = model.embedding.weight.shape[1]
        raise ValueError(f"optimizer.rank={settings['rank']} leaves no matrix of width {width} to factor: lower it")
    clip = settings["max_grad_norm"] or None
    adam = {"adamw_betas": settings["betas"], "adamw_eps": settings["eps"]}
    return [MoFaSGD(groups, max_grad_norm=clip, seed=seed, **adam)]


METHODS: dict[str, Method] = {
    "mofasgd": Method(
        _mofasgd,
        {"lr": 0.02, "adamw_lr": 3e-3, "rank": 32, **_MOMENTUM, **_ADAM, "weight_decay": 0.0}
        | {"complement": 0.0, "lr_scale": "spectral", "attach": "auto", "max_grad_norm": 0.0},
        "this package; `complement: 1` adds the normalized complement",
    ),
    "adamw": Method(
        _adam(AdamW),
        {"lr": 1e-3, "adamw_lr": 3e-3, **_ADAM, "weight_decay": 0.1, "max_grad_norm": 1.0},
        "torch.optim.AdamW; embedding and head with a rate of their own, as in all other rows",
    ),
    "adam": Method(
        _adam(Adam),
        {"lr": 1e-3, "adamw_lr": 3e-3, **_ADAM, "weight_decay": 0.0, "max_grad_norm": 1.0},
        "torch.optim.Adam; its weight_decay is an L2 penalty",
    ),
    "sgd": Method(
        _sgd,
        {"lr": 0.3, **_MOMENTUM, "weight_decay": 0.0, "max_grad_norm": 1.0},
        "torch.optim.SGD with momentum, for all parameters",
    ),
    "muon": Method(
        _muon,
        {"lr": 0.02, "adamw_lr": 3e-3, **_MOMENTUM, **_ADAM, "weight_decay": 0.0, "max_grad_norm": 0.0},
        "torch.optim.Muon (Nesterov, five Newton-Schulz steps), AdamW for embedding and head",
    ),
    "galore": Method(
        _galore,
        {"lr": 0.02, "adamw_lr": 3e-3, "rank": 32, "gap": 200, "scale": 0.25, **_ADAM, "weight_decay": 0.0}
        | {"max_grad_norm": 1.0},
        "mofasgd.app.galore, equal to galore-torch 1.0; AdamW for embedding and head",
    ),
    "row_norm": Method(
        _row_norm,
        {"lr": 0.04, "adamw_lr": 3e-3, **_ADAM, "weight_decay": 0.0, "max_grad_norm": 0.0},
        "every row of the gradient at equal length: no state; AdamW for embedding and head",
    ),
    **{name: Method(*row) for name, row in ROWS.items()},
}


def resolve(config: OptimizerConfig) -> Settings:
    """Return all settings of the method, those left out with its defaults.

    Raises:
        ValueError: for an unknown method, a setting that it does not have, or a value out of range.
    """
    check_choice("optimizer.name", config.name, tuple(METHODS))
    given = {k: v for k, v in dataclasses.asdict(config).items() if v is not None and k != "name"}
    settings = fill({name: method.defaults for name, method in METHODS.items()}, config.name, given, "optimizer.")
    if "beta_start" in given and not settings["beta_warmup_steps"]:
        raise ValueError(
            f"optimizer.beta_start={settings['beta_start']:g} takes effect with optimizer.beta_warmup_steps only"
        )
    return settings


def fill(table: Mapping[str, Settings], name: str, given: Settings, prefix: str = "") -> Settings:
    """Return the settings of the row `name` of a table of defaults, replaced by `given`; `prefix` is for errors.

    Raises:
        ValueError: for a setting that the row does not have, or a value out of range.
    """
    defaults = table[name]
    for key, value in given.items():
        if key not in defaults:
            fits = [other for other, settings in table.items() if key in settings]
            raise ValueError(
                f"{prefix}{key}={value!r} does not apply to {name}, which has {', '.join(defaults)}: "
                f"drop it (it is a setting of {', '.join(fits)})"
            )
    settings = defaults | given
    _check(settings, prefix)
    return settings


def _check(settings: Settings, prefix: str) -> None:
    """Check what the optimizers behind the table do not check, or would report under another name."""
    numbers = ("lr", "adamw_lr", "head_lr", "eps", "weight_decay", "scale", "gradient_scale", "alpha")
    for key in (*numbers, "max_grad_norm", "complement", "eta1", "eta2", "clip_eps", "max_value"):
        if settings.get(key) is not None:
            check_number(f"{prefix}{key}", settings[key], 0.0)
    for key in ("beta", "beta_start"):
        if key in settings:
            check_number(f"{prefix}{key}", settings[key], 0.0, 1.0)
    for value in settings.get("betas", ()):
        check_number(f"{prefix}betas", value, 0.0, 1.0)
    for key, low in (("rank", 1), ("gap", 1), ("ns_steps", 1), ("beta_warmup_steps", 0)):
        if key in settings:
            check_whole(f"{prefix}{key}", settings[key], low)


def build(model: GPT, config: OptimizerConfig, seed: int) -> tuple[list[Optimizer], Settings]:
    """Return the optimizers that train `model` together and the resolved settings."""
    settings = resolve(config)
    return METHODS[config.name].build(model, settings, seed), settings


def table() -> str:
    """Return the methods with their settings, one a paragraph."""
    lines = ["optimizers and the defaults of their settings:"]
    for name, method in METHODS.items():
        settings = ", ".join(f"{key} {value}" for key, value in method.defaults.items())
        lines.append(f"  {name}: {method.note}\n{textwrap.indent(textwrap.fill(settings, 90), ' ' * 6)}")
    return "\n".join(lines)


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Return the bytes of all tensors in the optimizers' states."""
    return sum(
        value.numel() * value.element_size()
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
