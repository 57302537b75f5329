"""Which settings make a run what it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mofasgd.app.baselines import resolve
from mofasgd.app.config import PretrainConfig

_FREE = {
    *("out", "resume", "eval_every", "log_every", "tensorboard", "wandb", "gpus"),
    *("checkpoint_every", "keep_checkpoints", "save_last", "data.cache", "memory_history"),
}
"""Without influence on weights and final loss (the number of ranks: up to rounding; a resumed run tells of it)."""

_BY_CONTENT = {"data.train", "data.validation", "data.tokenizer"}
"""Paths, whose content the data's checksum covers."""

_OTHER_MACHINE = {"device", "compile", "eval_tokens"}
"""A resumed run may change these; its weights then agree with an unbroken run's up to rounding only."""


def plain(config: Any) -> dict[str, Any]:
    """Return a configuration as YAML and JSON can hold it."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    converted: dict[str, Any] = convert(dataclasses.asdict(config))
    return converted


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of a configuration as `plain` returns it."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def identity(config: PretrainConfig) -> dict[str, Any]:
    """Return the settings that decide a run's result, by dotted key; the optimizer's with defaults filled in."""
    content = plain(config)
    settings = {"name": config.optimizer.name, **resolve(config.optimizer)}
    content["optimizer"] = json.loads(json.dumps(settings))
    return {key: value for key, value in flat(content) if key not in _FREE | _BY_CONTENT}


def digest(config: PretrainConfig) -> str:
    """Return a hash of `identity`."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]


def check_same_run(then: dict[str, Any], config: PretrainConfig) -> None:
    """Raise ValueError for a setting that differs from the `identity` of the run to be resumed."""
    for key, value in identity(config).items():
        if key not in _OTHER_MACHINE and then.get(key) != value:
            raise ValueError(
                f"{key}={value!r} was {then.get(key)!r} in the run to be resumed: put it back, or start another run "
                "with another --out"
            )
