"""The keys that LLaMA-Factory does not have: those of the authors' fork, and `use_mofasgd` with `mofasgd_*`.

A key that nothing reads, and a value that asks for what does not happen, is refused.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mofasgd.options import check_flag, check_number, check_whole, did_you_mean

Config = dict[str, Any]

AUTHORS: Config = {
    "mfsgd_rank": 2,
    "mfsgd_beta": 0.9,
    "mfsgd_eta1": 1.0,
    "mfsgd_eta2": 0.0,
    "mfsgd_eps": 1e-4,
    "mfsgd_nesterov": False,
    "mfsgd_use_current_projection": False,
    "mfsgd_use_ones_for_nonzero_s": False,
    "mfsgd_max_value": 10000.0,
    "learning_rate_mfsgd": None,
    "learning_rate_adamw": None,
}
"""The fork's keys beside `use_mfsgd`, and its defaults (of eta2: 1, without effect); rates: learning_rate."""

_DEAD = {
    "mfsgd_eta2": "it is the factor of a part of the gradient that is gone by the step, in the authors' fork as well: "
    "write 0; use_mofasgd has such a part in mofasgd_complement",
    "mfsgd_nesterov": "the authors' fork does nothing with it: write false",
    "mfsgd_use_current_projection": "it says where eta2's part comes from, which the authors' fork does not have: "
    "write false",
}

MEMORY = (
    "profile_memory_from_start",
    "profile_memory_max_entries",
    "profile_memory_stop_step",
    "profile_memory_stop_accumulation_step",
)

_FORK_ONLY = {
    **dict.fromkeys(
        ("galore_fused", "galore_lr_galore_params", "galore_lr_non_galore_params"),
        "the authors' fork has a GaLore of its own; LLaMA-Factory's has galore_rank, galore_update_interval, "
        "galore_scale, galore_proj_type and galore_layerwise",
    ),
    **dict.fromkeys(
        ("muon_momentum", "muon_nesterov", "muon_ns_steps"),
        "the authors' fork has it; LLaMA-Factory's Muon has momentum 0.95, Nesterov and five steps",
    ),
}


@dataclass(frozen=True)
class Recording:
    """When the GPU's allocations are recorded.

    Attributes:
        early: from before the model is loaded, not from the first step on.
        max_entries: allocations that are kept.
        stop_step: optimizer steps to record; None: all.
        stop_accumulation_step: micro-batches of the first step to record; None: `stop_step` says it.
    """

    early: bool
    max_entries: int
    stop_step: int | None
    stop_accumulation_step: int | None


@dataclass(frozen=True)
class Plan:
    """A configuration, taken apart.

    Attributes:
        method: "mfsgd" (the authors' step), "mofasgd" (this package's), or None: LLaMA-Factory's own optimizer.
        options: of the method, by their names without prefix; "mfsgd" has all, "mofasgd" those that were given.
        attach: how gradients are kept out of memory, as in `mofasgd.hf.trainer_kwargs`; None: by number of processes.
        recording: or None.
        rest: what LLaMA-Factory is given.
        notes: on values that another one makes idle.
    """

    method: str | None
    options: Config
    attach: str | None
    recording: Recording | None
    rest: Config
    notes: tuple[str, ...] = ()


def _is_own(key: str) -> bool:
    return key in AUTHORS or key.startswith(("use_mfsgd", "use_mofasgd", "mfsgd_", "mofasgd_", "profile_memory_"))


def read(config: Config, upstream: Collection[str]) -> Plan:
    """Take a configuration apart.

    Args:
        config: as in LLaMA-Factory's YAML files.
        upstream: the keys that LLaMA-Factory has.

    Raises:
        ValueError: for an unknown key, or one without effect.
    """
    for key in config:
        if key in _FORK_ONLY and key not in upstream:
            raise ValueError(f"{key}={config[key]!r} is not supported: {_FORK_ONLY[key]}; drop it")
        if key not in upstream and not _is_own(key):
            known = (*upstream, "use_mfsgd", "use_mofasgd", *AUTHORS, *MEMORY)
            raise ValueError(f"{key!r} is a key of neither LLaMA-Factory nor mofasgd{_nearest(key, known)}")
    own = {key: value for key, value in config.items() if _is_own(key)}
    rest = {key: value for key, value in config.items() if not _is_own(key)}
    recording = _recording({key: own.pop(key) for key in list(own) if key.startswith("profile_memory_")})
    method = _method(own)
    attach = own.pop("mofasgd_attach", None) if method else None
    if method == "mfsgd":
        options, notes = _authors(own)
        return Plan(method, options, attach, recording, rest, notes)
    for key in own:
        if method is None:
            family = "use_mofasgd" if key.startswith("mofasgd_") else "use_mfsgd"
            raise ValueError(f"{key}={own[key]!r} would be without effect: add {family}: true, or drop it")
        if not key.startswith("mofasgd_"):
            raise ValueError(
                f"{key}={own[key]!r} would be without effect: it is a key of use_mfsgd; use_mofasgd has mofasgd_lr, "
                "mofasgd_adamw_lr, mofasgd_rank, ..."
            )
    options = {key.removeprefix("mofasgd_"): value for key, value in own.items()}
    return Plan(method, options, attach, recording, rest)


def _nearest(key: str, known: Collection[str]) -> str:
    near = did_you_mean(key, tuple(known))
    return near if "did you mean" in near else ""


def _method(own: Config) -> str | None:
    """Take the switches out of `own`; return which one is on."""
    on = []
    for method in ("mfsgd", "mofasgd"):
        value = own.pop(f"use_{method}", False)
        check_flag(f"use_{method}", value)
        on += [method] if value else []
    if len(on) == 2:
        raise ValueError("use_mfsgd and use_mofasgd are both true: the first is the authors' step, drop one of them")
    return on[0] if on else None


def _authors(own: Config) -> tuple[Config, tuple[str, ...]]:
    """Return the authors' options with the fork's defaults, and notes on idle ones."""
    for key in own:
        if key not in AUTHORS:
            raise ValueError(f"{key!r} is no key of use_mfsgd{did_you_mean(key, tuple(AUTHORS))}")
        if own[key] is None and AUTHORS[key] is not None:
            raise ValueError(
                f"{key}: null is no value: give one, or drop the key for the fork's default {AUTHORS[key]!r}"
            )
    options = AUTHORS | own
    for key in ("learning_rate_mfsgd", "learning_rate_adamw"):
        if options[key] is not None:
            check_number(key, options[key], 0.0)
    for key in ("mfsgd_nesterov", "mfsgd_use_current_projection", "mfsgd_use_ones_for_nonzero_s"):
        check_flag(key, options[key])
    for key, why in _DEAD.items():
        if options[key]:
            raise ValueError(f"{key}={options[key]!r} would be without effect: {why}")
    notes: tuple[str, ...] = ()
    if options["mfsgd_use_ones_for_nonzero_s"] and "mfsgd_max_value" in own:
        notes = ("mfsgd_max_value is idle: mfsgd_use_ones_for_nonzero_s=true, as in the authors' fork",)
    return {key.removeprefix("mfsgd_"): value for key, value in options.items() if key not in _DEAD}, notes


def _recording(own: Config) -> Recording | None:
    for key in own:
        if key not in MEMORY:
            raise ValueError(f"{key!r} is no key of the memory profile{did_you_mean(key, MEMORY)}")
    early, entries, step, micro = (own.get(key) for key in MEMORY)
    check_flag(MEMORY[0], early or False)
    for key in MEMORY[1:]:
        if own.get(key) is not None:
            check_whole(key, own[key], 1)
    if not early and step is None and micro is None:
        if entries is not None:
            raise ValueError(f"{MEMORY[1]}={entries} takes effect with {MEMORY[0]}: true or a stop step: add one")
        return None
    if step is not None and micro is not None:
        raise ValueError(f"{MEMORY[2]}={step} and {MEMORY[3]}={micro}: the recording stops once, drop one of them")
    return Recording(bool(early), 1_000_000 if entries is None else entries, step, micro)
