"""The keys of the authors' optimizer configurations: their values, and what they are on this package's rows.

A key that nothing reads is refused, also where the authors' code drops it without a word. A value that another one
makes idle, as in their code, is noted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mofasgd.options import check_choice, check_flag, check_number, check_whole, did_you_mean

Config = dict[str, Any]
Given = Mapping[str, str]
"""Top-level key -> the flag that brought its value, "--config" or "--config-path"; base configurations bring none."""

BASES: dict[str, Config] = {
    "mfsgd": {"lr": 0.05, "rank": 32, "beta": 0.95, "eta1": 0.25, "eta2": 0, "use_current_projection": True}
    | {"use_ones_for_nonzero_s": False, "eps": 1e-10, "max_value": 5, "warmup_steps": 300, "beta_start": 0.65}
    | {"beta_end": 0.85, "nesterov": False, "scheduler_name": "original", "cooldown_frac": 0.4},
    "muon": {"lr": 0.05, "momentum": 0.95, "nesterov": True, "cooldown_frac": 0.4},
    "adam": {"lr": 0.0003, "betas": [0.9, 0.95], "cooldown_frac": 0.4},
    "adamw": {"lr": 0.002, "betas": [0.8, 0.95], "weight_decay": 0.0, "fused": True, "cooldown_frac": 0.4},
    "sgd": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "cooldown_frac": 0.4},
    "galore": {"lr": 0.008, "betas": [0.9, 0.95], "weight_decay": 0.0, "eps": 1e-8, "cooldown_frac": 0.4}
    | {"group_params": {"rank": 32, "update_proj_gap": 75, "scale": 0.25, "proj_type": "std"}},
}
"""What the authors' configs/optimizers/*.yaml say."""

_FALLBACKS: dict[str, Config] = {
    "mfsgd": {"lr": 0.01, "rank": 2, "beta": 0.9, "eta1": 1.0, "eta2": 1.0, "use_current_projection": False}
    | {"use_ones_for_nonzero_s": False, "eps": 1e-4, "nesterov": False, "max_value": 10000}
    | {"warmup_steps": 600, "beta_start": 0.15, "beta_end": 0.95},
    "muon": {"lr": 0.02, "momentum": 0.95, "nesterov": True, "ns_steps": 5},
    "adam": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "fused": True},
    "adamw": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "fused": True},
    "sgd": {"lr": 1e-3, "momentum": 0.0, "dampening": 0, "weight_decay": 0.0, "nesterov": False},
    "galore": {"lr": 0.02, "betas": [0.8, 0.95], "weight_decay": 0.0, "eps": 1e-8, "fused": False, "group_params": {}},
}
"""What their code takes for a key that its configuration lacks."""

_GROUP_FALLBACKS: Config = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
_SCHEDULE: Config = {"scheduler_name": "original", "cooldown_frac": 0.4, "lr_warmup_steps": 100}

_SETTINGS = {
    "mfsgd": {"beta_end": "beta", "warmup_steps": "beta_warmup_steps", "eps": "clip_eps"},
    "sgd": {"momentum": "beta"},
    "galore": {"update_proj_gap": "gap"},
}
"""Their key -> the row's setting, where the names differ."""

_FUSED = (True, "Adam and AdamW are always fused here")
_ONLY: dict[str, dict[str, tuple[Any, str]]] = {
    "mfsgd": {},
    "muon": {"momentum": (0.95, "as in the authors' code it grows from 0.85 to 0.95 over 300 steps, whatever it says")},
    "adam": {"fused": _FUSED},
    "adamw": {"fused": _FUSED},
    "sgd": {"dampening": (0, "dampened momentum is not supported")},
    "galore": {
        "fused": (False, "galore-torch has no fused step"),
        "proj_type": ("std", "only the projection of the shorter side is implemented"),
    },
}
"""Their key -> the only value that is taken, and why. No setting: the row is built so."""

SCHEDULERS = ("original", "original_warmup")


def merged(optimizer: str, path: Path | None, override: str | None) -> tuple[Config, Given]:
    """Return the authors' configuration of a run, and which of its keys the user's file and JSON give.

    As in their code, the file takes the place of the base configuration, and JSON overrides whole top-level keys.

    Args:
        optimizer: a key of `BASES`.
        path: a YAML file, or None for the base configuration.
        override: a JSON object, or None.

    Raises:
        ValueError: for an unreadable file or text, or an unknown key.
    """
    changed = {} if override is None else _from_json(override)
    base = BASES[optimizer] if path is None else _from_yaml(path)
    given = {} if path is None else dict.fromkeys(base, "--config-path")
    given |= dict.fromkeys(changed, "--config")
    for source in (base, changed):
        _check_keys(source, {**_FALLBACKS[optimizer], **_SCHEDULE}, f"--optimizer {optimizer}")
    config = {**_FALLBACKS[optimizer], **_SCHEDULE, **base, **changed}
    if "group_params" in config:
        group = config["group_params"]
        if not isinstance(group, dict):
            raise ValueError(f"group_params={group!r} should be an object of {', '.join(_GROUP_FALLBACKS)}")
        _check_keys(group, _GROUP_FALLBACKS, "group_params")
        config["group_params"] = _GROUP_FALLBACKS | group
    return config, given


def _from_json(text: str) -> Config:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--config is no JSON ({error}): quote it as --config '{{\"rank\": 16}}'") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config={text} should be a JSON object, as in '{{\"rank\": 16}}'")
    return content


def _from_yaml(path: Path) -> Config:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config-path={path} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config-path={path} should hold keys and values, as in 'rank: 16'")
    return content


def _check_keys(config: Config, known: Mapping[str, Any], where: str) -> None:
    for key, value in config.items():
        if key not in known:
            raise ValueError(f"{key!r} is no key of {where}{did_you_mean(str(key), tuple(known))}")
        if value is None:
            raise ValueError(f"{key}=null is no value: give one, or drop the key")
        if isinstance(value, str) and not isinstance(known[key], str):
            raise ValueError(f"{key}={value!r} is text: write a number as 1.0e-4, which YAML reads as one, not 1e-4")
        if isinstance(known[key], bool):
            check_flag(key, value)
        elif isinstance(known[key], (int, float)):
            check_number(key, value, float("-inf"))


def settings_of(optimizer: str, config: Config, given: Given) -> tuple[Config, list[str]]:
    """Return the settings of the row `authors_<optimizer>`, and notes on values that are idle.

    Raises:
        ValueError: for a value that asks for what does not happen.
    """
    flat = {key: value for key, value in config.items() if key not in _SCHEDULE and key != "group_params"}
    flat |= config.get("group_params", {})
    for key, (taken, why) in _ONLY[optimizer].items():
        value = flat.pop(key)
        if value != taken and (key != "momentum" or key in given):
            raise ValueError(f"{key}={value!r} would be without effect: {why}; drop it")
    notes = _mfsgd_notes(flat, given) if optimizer == "mfsgd" else []
    settings = {_SETTINGS.get(optimizer, {}).get(key, key): value for key, value in flat.items()}
    if optimizer == "muon":
        settings |= {"beta": 0.95, "beta_start": 0.85, "beta_warmup_steps": 300}
    return settings, notes


def _mfsgd_notes(flat: Config, given: Given) -> list[str]:
    """Take `beta`, and without warm-up `beta_start`, out of `flat`; return notes on what is idle."""
    notes, beta = [], flat.pop("beta")
    if beta != flat["beta_end"]:
        why = f"as in the authors' code the momentum grows from beta_start to beta_end={flat['beta_end']!r}"
        # Their own file has such a beta: told of, not refused.
        if given.get("beta") == "--config":
            raise ValueError(f"beta={beta!r} would be without effect: {why}; give beta_end")
        notes.append(f"beta={beta!r} is idle: {why}")
    if not flat["warmup_steps"]:
        start = flat.pop("beta_start")
        if "beta_start" in given:
            notes.append(f"beta_start={start!r} is idle: warmup_steps=0, the momentum is beta_end from the first step")
    if flat["use_current_projection"] and not flat["eta2"]:
        notes.append("use_current_projection is idle, as in the authors' code: eta2=0")
    if flat["use_ones_for_nonzero_s"] and "max_value" in given:
        notes.append("max_value is idle, as in the authors' code: use_ones_for_nonzero_s=true")
    return notes


def schedule_of(config: Config, given: Given, steps: int) -> tuple[dict[str, float], list[str]]:
    """Return `warmup` and `cooldown` as shares of the steps, and notes.

    Raises:
        ValueError: for a schedule that is not linear, or a warm-up that its schedule does not have.
    """
    name = config["scheduler_name"]
    if name in ("cosine", "cosine_warmup", "exponential"):
        raise ValueError(
            f"scheduler_name={name!r} is not supported: the rate is constant and then falls linearly; use 'original', "
            "the schedule of the authors' paper runs, or 'original_warmup'"
        )
    check_choice("scheduler_name", name, SCHEDULERS)
    if name == "original":
        only = "takes effect with scheduler_name='original_warmup' only"
        if given.get("lr_warmup_steps") == "--config":
            raise ValueError(f"lr_warmup_steps {only}: drop it")
        idle = [f"lr_warmup_steps is idle: it {only}"] if "lr_warmup_steps" in given else []
        return {"warmup": 0.0, "cooldown": config["cooldown_frac"]}, idle
    check_whole("lr_warmup_steps", config["lr_warmup_steps"], 0)
    note = "lr_warmup_steps: also embedding and head are warmed up, and the first step's rate is above 0; not so there"
    return {"warmup": config["lr_warmup_steps"] / steps, "cooldown": config["cooldown_frac"]}, [note]
