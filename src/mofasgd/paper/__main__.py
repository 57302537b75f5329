"""The authors' run.py on this package's application: `python -m mofasgd.paper --optimizer mfsgd --num-gpus 4 ...`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import glob
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mofasgd.app.baselines import resolve
from mofasgd.app.config import PretrainConfig
from mofasgd.app.errors import Stopped
from mofasgd.app.identity import plain
from mofasgd.app.trainer import choose_device
from mofasgd.cli import configured
from mofasgd.options import check_choice, check_whole
from mofasgd.paper.keys import BASES, merged, schedule_of, settings_of
from mofasgd.snapshot import check_recordable

PROG = "python -m mofasgd.paper"

# Of the authors' train_gpt.py.
TOKENS, MICRO_TOKENS, STEPS, VALIDATION_TOKENS = 8 * 64 * 1024, 64 * 1024, 1390, 10 * 2**20
CONTEXT = 1024
TRAIN, VALIDATION = (f"data/fineweb10B/fineweb_{part}_*.bin" for part in ("train", "val"))
RUN: dict[str, Any] = (
    {"model.layers": 12, "model.width": 768, "model.heads": 6, "model.vocab_size": 50304}
    | {"data.train": [TRAIN], "data.validation": [VALIDATION], "data.context": CONTEXT}
    | {"steps": STEPS, "batch_size": TOKENS // CONTEXT, "eval_every": 20, "eval_tokens": VALIDATION_TOKENS}
    | {"save_last": False}
)
"""What all their runs share, in keys of `mofasgd pretrain`."""


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        allow_abbrev=False,
        description="Run the authors' NanoGPT experiments: their flags, then any flag of `mofasgd pretrain`, which "
        "comes before what theirs say (--steps 20 --model.layers 2 --device cpu).",
    )
    parser.add_argument("--optimizer", default="muon", help=f"one of {', '.join(BASES)} (default muon)")
    parser.add_argument("--config-path", type=Path, help="YAML file in place of the optimizer's base configuration")
    parser.add_argument("--config", help="JSON object with keys that override it")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs of the authors' run, whose batch is reproduced")
    parser.add_argument("--list-configs", action="store_true", help="print the base configurations")
    parser.add_argument("--dry-run", action="store_true", help="print the mapped configuration as JSON; no data or GPU")
    parser.add_argument(
        "--mem-prof", action="store_true", help="record the GPU's allocations; default: of the whole run"
    )
    parser.add_argument("--mem-snap-step", type=int, help="with --mem-prof: to the end of this step (from 0)")
    parser.add_argument("--mem-start-step", type=int, help="with --mem-prof: from the end of this step")
    parser.add_argument("--mem-end-step", type=int, help="with --mem-start-step: to the end of this step")
    return parser


def _memory(flags: argparse.Namespace) -> tuple[int, int | None] | None:
    """Return the first step to record and the one to stop before (None: none), or None without --mem-prof."""
    snap, begin, end = flags.mem_snap_step, flags.mem_start_step, flags.mem_end_step
    for name, value in (("snap", snap), ("start", begin), ("end", end)):
        if value is not None and not flags.mem_prof:
            raise ValueError(f"--mem-{name}-step={value} takes effect with --mem-prof only: add it")
        if value is not None:
            check_whole(f"--mem-{name}-step", value, 0)
    if not flags.mem_prof:
        return None
    if snap is not None and (begin is not None or end is not None):
        raise ValueError(f"--mem-snap-step={snap} records from the start on: drop it, or the other two steps")
    if end is not None and begin is None:
        raise ValueError(f"--mem-end-step={end} takes effect with --mem-start-step only: add it")
    if end is not None and end <= begin:
        raise ValueError(f"--mem-end-step={end} is not after --mem-start-step={begin}: raise it")
    if snap is not None:
        return 0, snap + 1
    return (0 if begin is None else begin + 1), (None if end is None else end + 1)


def _summed(num_gpus: int) -> int:
    """Return how many micro-batches each of the authors' GPUs summed the gradients of.

    Raises:
        ValueError: for a number of GPUs among which their batches cannot be divided.
    """
    if num_gpus < 1 or TOKENS % num_gpus or VALIDATION_TOKENS % (num_gpus * MICRO_TOKENS):
        raise ValueError(f"--num-gpus={num_gpus} does not divide the authors' batches: use 1, 2, 4, 8, 16 or 32")
    return max(1, TOKENS // num_gpus // MICRO_TOKENS)


def mapped(flags: argparse.Namespace, rest: Sequence[str]) -> tuple[Any, PretrainConfig, dict[str, Any]]:
    """Return the function to run, its configuration, and what --dry-run prints.

    Args:
        flags: the authors'.
        rest: flags of `mofasgd pretrain`.

    Raises:
        ValueError: for what cannot be mapped.
    """
    if flags.optimizer == "lomuon":
        raise ValueError("--optimizer='lomuon' is the authors' earlier name of it; did you mean 'mfsgd'?")
    check_choice("--optimizer", flags.optimizer, tuple(BASES))
    theirs, given = merged(flags.optimizer, flags.config_path, flags.config)
    settings, notes = settings_of(flags.optimizer, theirs, given)
    schedule, more = schedule_of(theirs, given, _steps(rest))
    summed = _summed(flags.num_gpus)
    settings |= {"name": f"authors_{flags.optimizer}", "gradient_scale": float(summed)}
    defaults = {**RUN, "out": f"runs/paper/{flags.optimizer}", **schedule}
    defaults |= {f"optimizer.{key}": value for key, value in settings.items()}
    function, config = configured("pretrain", rest, prog=PROG, defaults=defaults)
    config = _fitted(config, rest, _memory(flags))
    resolve(config.optimizer)
    times = config.batch_size // config.micro_batch_size
    notes += [
        *more,
        f"num_gpus={flags.num_gpus}: one device takes the whole batch of {config.batch_size * config.data.context} "
        f"tokens, {times} times {config.micro_batch_size} sequences; gradients are multiplied by {summed}, the number "
        "of micro-batches that each GPU summed",
    ]
    told = plain(config)
    told["optimizer"] = {key: value for key, value in told["optimizer"].items() if value is not None}
    return function, config, {"theirs": theirs, "pretrain": told, "notes": notes}


def _misspelled(rest: Sequence[str]) -> str | None:
    """Return an error for a flag in `rest` that is nearer to one of the authors' than to any of `mofasgd pretrain`."""
    own = [flag for action in _flags()._actions for flag in action.option_strings]
    known = [*own, *(f"--{field.name}" for field in dataclasses.fields(PretrainConfig))]
    for word in rest:
        name = word.partition("=")[0]
        near = difflib.get_close_matches(name, known, n=1) if name.startswith("--") and "." not in name else []
        if near and near[0] in own:
            return f"unrecognized arguments: {name}; did you mean {near[0]!r}?"
    return None


def _given(rest: Sequence[str], key: str) -> bool:
    return any(word == f"--{key}" or word.startswith(f"--{key}=") for word in rest)


def _steps(rest: Sequence[str]) -> int:
    """Return the steps of the run, which the authors' warm-up is a share of."""
    if not _given(rest, "steps"):
        return STEPS
    config: PretrainConfig = configured("pretrain", rest, prog=PROG)[1]
    return config.steps


def _fitted(config: PretrainConfig, rest: Sequence[str], memory: tuple[int, int | None] | None) -> PretrainConfig:
    """Return `config` with what follows from the flags in `rest`, where these do not say it themselves."""
    changes: dict[str, Any] = {}
    size = config.batch_size
    if not _given(rest, "batch_size"):
        size = changes["batch_size"] = max(1, TOKENS // config.data.context)
    if not _given(rest, "micro_batch_size"):
        most = max(1, MICRO_TOKENS // config.data.context)
        changes["micro_batch_size"] = max(n for n in range(1, size + 1) if size % n == 0 and n <= most)
    if _given(rest, "data.train") and not _given(rest, "data.validation"):
        changes["data"] = dataclasses.replace(config.data, validation=[])
    if memory is not None:
        begin, end = memory[0], config.steps if memory[1] is None else memory[1]
        for name, step in (("start-step", begin), ("snap-step or --mem-end-step", end - 1)):
            if step >= config.steps:
                raise ValueError(
                    f"--mem-{name} is too late, the last step is {config.steps - 1}: lower it, or raise --steps"
                )
        changes["memory_history"] = begin, end
    return dataclasses.replace(config, **changes)


def _check_machine(config: PretrainConfig) -> None:
    """Raise ValueError if the shards that nobody named are not there, or the device cannot do what was asked for."""
    if config.memory_history is not None:
        check_recordable("--mem-prof", choose_device(config.device))
    for key, pattern, sources in (
        ("train", TRAIN, config.data.train),
        ("validation", VALIDATION, config.data.validation),
    ):
        if sources == [pattern] and not glob.glob(pattern):
            raise ValueError(
                f"there are no FineWeb shards {pattern} (modded-nanogpt's data/cached_fineweb10B.py fetches them): "
                f"name yours with --data.{key}, or text to try it out"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the authors' command line; return its exit status, as `mofasgd.cli.main`."""
    flags, rest = _flags().parse_known_args(arguments)
    wrong = _misspelled(rest)
    if wrong is not None:
        print(f"{PROG}: error: {wrong}", file=sys.stderr)
        return 2
    try:
        if flags.list_configs:
            print(json.dumps(BASES, indent=1))
            return 0
        function, config, told = mapped(flags, rest)
        if flags.dry_run:
            print(json.dumps(told, indent=1))
            return 0
        for note in told["notes"]:
            print(f"{PROG}: {note}", file=sys.stderr)
        _check_machine(config)
        function(config)
    except (ValueError, OSError, Stopped) as error:
        print(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
