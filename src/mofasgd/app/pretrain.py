"""`mofasgd pretrain`: in this process, as one of torchrun's, or in processes that it starts with `gpus`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from multiprocessing import get_context
from multiprocessing.synchronize import Event

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mofasgd.app.baselines import table
from mofasgd.app.config import PretrainConfig
from mofasgd.app.display import Display
from mofasgd.app.errors import Lost, Stopped
from mofasgd.app.ranks import joined, started
from mofasgd.app.run import last_checkpoint, resume_command, train

SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Seconds that torch's launcher leaves processes to end by themselves, to write a checkpoint for instance."""

_PATIENCE = 10.0
"""Seconds within which the launcher, which looks ten times a second, has surely found a rank that was killed."""


def help_epilog() -> str:
    """Return the table of methods for the end of the help."""
    return table()


def pretrain(config: PretrainConfig) -> None:
    """Train a compact GPT from scratch with MoFaSGD or a baseline."""
    if started():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", config.gpus))
        if config.gpus not in (1, here):
            raise ValueError(f"gpus={config.gpus}, but torchrun has started {here} processes here: leave gpus out")
        _train_here(config)
    elif config.gpus > 1:
        _launch(config)
    else:
        _train_here(config)


def _train_here(config: PretrainConfig, *, tells_of_loss: bool = True) -> None:
    """Train in this process, alone or among others; of several ranks that fail, the first one says why.

    Args:
        config: of the run.
        tells_of_loss: say that another rank is gone; who has started the ranks knows more about it.
    """
    with joined(config.device) as ranks:
        display = Display(quiet=not ranks.lead)
        try:
            result = train(config, display, ranks)
        except (ValueError, OSError, Stopped, KeyboardInterrupt) as error:
            if isinstance(error, Lost) and not tells_of_loss:
                # The launcher names the first that it finds ended, and ends the others: be none of the first.
                time.sleep(_PATIENCE)
                raise SystemExit(1) from None
            if not ranks.claim():
                raise SystemExit(1) from None
            raise
        speed = "" if result["ms_per_step"] is None else f"; {result['ms_per_step']:.1f} ms per step"
        display.note(
            f"validation loss {result['validation_loss']:.4f} after {result['tokens']:,} tokens; optimizer state "
            f"{result['optimizer_state_mb']:.2f} MB{speed}; all in {config.out}"
        )


def _launch(config: PretrainConfig) -> None:
    """Train in `config.gpus` processes of this machine, started and watched by torch's launcher.

    Raises:
        ValueError: if there are not as many GPUs.
        Stopped: if a process has ended without a word.
        KeyboardInterrupt: if interrupted before there was anything to save.
    """
    there = torch.cuda.device_count()
    if config.device != "cpu" and there < config.gpus:
        raise ValueError(f"gpus={config.gpus}, but this machine has {there}: lower it, or add --device cpu")
    os.environ.setdefault(SHUTDOWN, "120")
    how = LaunchConfig(
        1, 1, config.gpus, run_id="mofasgd", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    told = get_context("spawn").Event()
    # Its reports would bury ours; what is worth telling of them is told below.
    logging.disable(logging.CRITICAL)
    try:
        elastic_launch(how, _work)(config, told)
    except ChildFailedError as error:
        if not told.is_set():
            raise Stopped(_ended(error, config)) from error
        raise SystemExit(1) from None
    except SignalException as error:
        if not told.is_set():
            raise KeyboardInterrupt from error
        raise SystemExit(1) from None
    finally:
        logging.disable(logging.NOTSET)


def _ended(error: ChildFailedError, config: PretrainConfig) -> str:
    """Return how a rank has ended and how to go on."""
    rank, failure = error.get_first_failure()
    how = f"has ended with exit status {failure.exitcode}"
    if failure.exitcode < 0:
        how = f"was killed by {signal.Signals(-failure.exitcode).name}"
    return f"rank {rank} {how}; {last_checkpoint(config)}. Go on with: {resume_command(config)}"


def _work(config: PretrainConfig, told: Event) -> None:
    """Be one of the processes that `_launch` has started."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.gpus))
    try:
        _train_here(config, tells_of_loss=False)
    except (ValueError, OSError, Stopped) as error:
        sys.stderr.write(f"mofasgd pretrain: error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        sys.stderr.write("mofasgd pretrain: interrupted\n")
    except Exception:
        traceback.print_exc()
    else:
        return
    told.set()
    sys.exit(1)
