"""Signals that ask a run to end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def catch_signals(apart: float = 0.0) -> Iterator[list[str]]:
    """Yield a list that receives the name of the first SIGINT or SIGTERM; a second signal acts at once.

    Args:
        apart: seconds for which a further signal counts as the first one: Ctrl-C reaches a process that a launcher has
            started twice, from the terminal and from the launcher.
    """
    caught: list[str] = []
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not caught:
            caught.append(signal.Signals(number).name)
            first = time.monotonic()
        elif time.monotonic() - first >= apart:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        restore()


@contextmanager
def raise_at_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt with the signal's name where SIGINT or SIGTERM comes; a second signal acts as ever."""

    def stop(number: int, frame: FrameType | None) -> None:
        restore()
        raise KeyboardInterrupt(signal.Signals(number).name)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()
