"""Several runs at a time, each in a process of its own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from mofasgd.app.display import Display
from mofasgd.app.errors import Stopped

Result = dict[str, Any]
Job = TypeVar("Job")


def _follow(parent: BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _child(execute: Callable[[Job], Result], job: Job, pipe: Connection) -> None:
    parent = parent_process()
    assert parent is not None
    # Without its parent it saves and stops: nobody would collect the result.
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    try:
        pipe.send(execute(job))
    except Exception as error:  # for the parent to tell
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _execute_apart(execute: Callable[[Job], Result], job: Job) -> Result | str:
    """Run a job in a process of its own, which takes a broken GPU context with it; return an error as text."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(execute, job, sender))
    process.start()
    sender.close()
    try:
        answer: Result | str = receiver.recv()
    except EOFError:
        answer = "killed"
    process.join()
    return answer if process.exitcode == 0 else f"{answer} (exit status {process.exitcode})"


def sweep(
    jobs: Sequence[Job],
    execute: Callable[[Job], Result],
    workers: int,
    keep: Callable[[Result], None],
    name: Callable[[Job], str],
    told: Callable[[Result], str],
) -> None:
    """Run `jobs` and keep their results as they come.

    Args:
        jobs: to run.
        execute: what runs one; with several workers it and the jobs are pickled.
        workers: at a time, each a process; 1: in this process, one after the other.
        keep: takes a result.
        name: of a job, for messages.
        told: a result as a message; used with several workers only, whose runs are quiet.

    Raises:
        Stopped: with several workers, if any run failed, after the others have finished.
    """
    if workers == 1:
        for job in jobs:
            keep(execute(job))
        return
    display, failures = Display(), []
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_execute_apart, execute, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                title, run = name(futures[future]), future.result()
                if isinstance(run, str):
                    failures.append(f"{title}: {run}")
                    display.note(failures[-1])
                    continue
                keep(run)
                display.note(f"{title}: {told(run)}")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise Stopped(f"{len(failures)} of {len(jobs)} runs failed, the first: {failures[0]}")
