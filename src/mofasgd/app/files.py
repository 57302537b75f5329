"""Files that are whole or not there, and folders with one writer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that takes the place of `path` once it is complete and on the disk.

    Raises:
        OSError: naming `path`, which is then as it was.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
        sync(path.parent)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error})") from error
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file, or the renames in a folder, survive a power cut, where folders can be opened."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_parts(folder: Path) -> None:
    """Remove what a killed process had not finished writing."""
    for part in folder.glob("*.part"):
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8."""
    with replaced(path) as out:
        out.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write `content`, whose numbers are finite."""
    write_text(path, json.dumps(content, indent=1, default=str, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError naming it if it is damaged."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or put a copy back") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no JSON object): delete it, or put a copy back")
    return content


@contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Make `folder` and hold it against other processes; the lock ends with the process, however it ends.

    Args:
        folder: to hold.
        key: of the configuration that names it, for errors.

    Raises:
        ValueError: if another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"{key}={folder} is no folder that can be written ({error.strerror})") from error
    with handle:
        try:
            import fcntl
        except ImportError:  # Windows has no such lock
            yield
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{key}={folder} is being written by another process: wait for it, or stop it") from error
        yield
