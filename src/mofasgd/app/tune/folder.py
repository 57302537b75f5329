"""The run folder of `mofasgd finetune`: whether it holds a run, how far that came, and how to go on with it."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mofasgd.app.config import Settings
from mofasgd.app.files import read_json
from mofasgd.app.identity import plain
from mofasgd.app.tune.config import FinetuneConfig
from mofasgd.app.tune.encode import Example

_FREE = {
    *("out", "resume", "eval_every", "log_every", "checkpoint_every", "keep_checkpoints", "samples", "exact_match"),
    *("max_new_tokens", "save_model", "profile_memory"),
}
"""Without influence on the weights."""


def identity(config: FinetuneConfig, settings: Settings, fingerprint: str) -> dict[str, Any]:
    """Return what decides a run's weights: settings with defaults filled in, and a checksum of the training rows."""
    content = {key: value for key, value in plain(config).items() if key not in _FREE | {"data"} | set(settings)}
    found: dict[str, Any] = json.loads(json.dumps({**content, **settings}))
    return {**found, "data.packing": config.data.packing, "data": fingerprint}


def fingerprint(examples: Sequence[Example]) -> str:
    """Return a checksum of rows in tokens."""
    content = [[example.input_ids, example.labels] for example in examples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint of transformers."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def newest(out: Path) -> Path | None:
    """Return the newest whole checkpoint; trainer_state.json is written last."""
    found = [path.parent for path in (out / "checkpoints").glob("checkpoint-*/trainer_state.json")]
    return max(found, key=step_of, default=None)


def resume_command(config: FinetuneConfig) -> str:
    """Return the command that goes on with a run."""
    return f"mofasgd finetune --config {shlex.quote(str(config.out / 'config.yaml'))} --resume true"


def left(config: FinetuneConfig) -> str:
    """Return what an interrupted training has left, for a message."""
    found = newest(config.out)
    return "there is no checkpoint yet" if found is None else f"the checkpoint of step {step_of(found)} is whole"


def earlier(config: FinetuneConfig) -> dict[str, Any]:
    """Return run.json of the run to be resumed, {} for a new one; refuse a folder that does not fit `config`.

    Raises:
        ValueError: for a new run in a used folder, a resumed one in a folder without a run, or a file in the way.
    """
    out = config.out
    for name in ("model", "adapter", "checkpoints"):
        if (out / name).is_file():
            raise ValueError(f"{out / name} is a file where the run writes a folder: move it, or name another --out")
    record, lines = out / "run.json", out / "metrics.jsonl"
    if config.resume:
        if not record.exists():
            raise ValueError(f"resume=true, but out={out} holds no run: correct --out, or leave --resume out")
        return read_json(record)
    # What was refused before its first step has left nothing to go on with.
    if newest(out) or (lines.exists() and lines.stat().st_size) or (record.exists() and "trained" in read_json(record)):
        raise ValueError(f"{out} holds a run already: add --resume true to go on, or name another --out")
    return {}
