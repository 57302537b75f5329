"""The command `mofasgd-llamafactory`; with several processes: torchrun -m mofasgd.hf.llamafactory train config.yaml."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from mofasgd.hf.llamafactory.keys import Plan, read
from mofasgd.hf.llamafactory.optimizers import callbacks, check, make
from mofasgd.snapshot import check_recordable

_logger = logging.getLogger(__name__)

PROG = "mofasgd-llamafactory"
USAGE = f"usage: {PROG} train CONFIG.yaml [KEY=VALUE ...]   (docs/coming-from-the-authors-code.md)"

_OWN_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
_OTHER_TRAINERS = ("use_mca", "use_hyper_parallel")


def _refuse_rivals(name: str, finetuning: Callable[[str], Any], training: Callable[[str], Any]) -> None:
    """Raise ValueError for another optimizer beside `name`, and for what shards its weights.

    Args:
        name: the switch that is on.
        finetuning, training: a key of LLaMA-Factory's arguments of that kind to its value, or None.
    """
    for key in (*_OWN_OPTIMIZERS, *_OTHER_TRAINERS):
        if finetuning(key):
            raise ValueError(f"{key}: true and {name}: true ask for two optimizers: drop one of them")
    ratio = finetuning("loraplus_lr_ratio")
    if ratio is not None:
        raise ValueError(f"loraplus_lr_ratio={ratio} and {name}: true: drop one of them")
    for key in ("deepspeed", "fsdp"):
        if training(key):
            raise ValueError(f"{key}={training(key)!r} shards what MoFaSGD steps: use one process or plain torchrun")


def refuse(plan: Plan, args: Any, finetuning: Any, stages: Sequence[str]) -> None:
    """Raise ValueError for what LLaMA-Factory can do and MoFaSGD in it cannot.

    Args:
        plan: with a method.
        args: LLaMA-Factory's TrainingArguments.
        finetuning: its FinetuningArguments.
        stages: that can be trained.
    """
    name = f"use_{plan.method}"
    if not args.do_train:
        raise ValueError(f"{name}: true would be without effect: nothing is trained; add do_train: true, or drop it")
    if finetuning.stage not in stages:
        raise ValueError(
            f"stage={finetuning.stage!r} makes its optimizer elsewhere: {name} works in {', '.join(stages)}"
        )
    if finetuning.finetuning_type not in ("full", "freeze"):
        raise ValueError(
            f"finetuning_type={finetuning.finetuning_type!r} trains small adapters, of which nothing is left to "
            f"factor: with {name} use 'full' or 'freeze'"
        )
    _refuse_rivals(name, lambda key: getattr(finetuning, key, None), lambda key: getattr(args, key, None))


def _show_log() -> None:
    """Let this package's messages be seen among LLaMA-Factory's."""
    package = logging.getLogger("mofasgd")
    if not package.handlers:
        package.addHandler(logging.StreamHandler())
    package.setLevel(logging.INFO)


def prepare(arguments: Sequence[str]) -> Callable[[], None]:
    """Return what runs LLaMA-Factory's training.

    Args:
        arguments: a YAML file, and key=value pairs that override it.

    Raises:
        ValueError: for a configuration that is wrong or asks for what does not happen.
    """
    if not arguments or not arguments[0].endswith((".yaml", ".yml")):
        raise ValueError(f"train takes a YAML file, not {' '.join(arguments[:1]) or 'nothing'!r}. {USAGE}")
    try:
        from mofasgd.hf.llamafactory import upstream
    except ModuleNotFoundError as error:
        if error.name != "llamafactory":
            raise
        raise ValueError("llamafactory is not installed: pip install 'mofasgd[llamafactory]'") from error
    # What it reads configurations with.
    sys.argv = [PROG, *arguments]
    plan = read(upstream.hparams.read_args(), upstream.known_keys())
    if plan.method is not None:
        # LLaMA-Factory asks for their packages first.
        _refuse_rivals(f"use_{plan.method}", plan.rest.get, plan.rest.get)
    _, _, args, finetuning, _ = upstream.hparams.get_train_args(dict(plan.rest))
    if plan.recording is not None:
        check_recordable("profile_memory_*")
    if plan.method is not None:
        if upstream.use_ray():
            raise ValueError("USE_RAY trains in other processes, which know nothing of MoFaSGD: unset it")
        refuse(plan, args, finetuning, upstream.STAGES)
        check(plan, args)
    if args.should_log:
        _show_log()
    for note in plan.notes:
        _logger.warning(note)
    return partial(_train, upstream, plan, args, finetuning.stage)


def _train(upstream: Any, plan: Plan, args: Any, stage: str) -> None:
    own = upstream.replaced(stage, partial(make, plan))
    watchers, memory = callbacks(plan)
    if memory is not None and memory.recording.early:
        memory.start(args)
    try:
        with nullcontext() if plan.method is None else own:
            upstream.run_exp(plan.rest, watchers)
    finally:
        # Also after an error: out of memory is what the recording is for.
        if memory is not None:
            memory.stop(args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 failed, 2 wrong call; a line says why."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command != "train":
        print(f"{PROG}: error: no command {command!r}: llamafactory-cli has the others. {USAGE}", file=sys.stderr)
        return 2
    try:
        train = prepare(rest)
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    # Its errors are LLaMA-Factory's, or of something far inside: they keep their traceback.
    train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
