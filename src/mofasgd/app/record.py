"""What a run leaves behind beside its checkpoints: where and with what it ran, and its metrics."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import torch

PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = ("torch", "numpy", "tokenizers", "triton", "transformers")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Return commit, versions, hardware and command, for a run's record."""
    # An installed package has no commit: its source says which code ran.
    source = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(PACKAGE.rglob("*.py")))).hexdigest()[:12]
    commit = _git("rev-parse", "HEAD")
    dirty = None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": commit,
        "dirty": dirty,
        "source": source,
        "python": platform.python_version(),
        "versions": {library: version for library in _LIBRARIES if (version := _version(library))},
        "cuda": torch.version.cuda,
        "device": f"{device.type}: {name}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that the file is whole or the old one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, default=str, allow_nan=False) + "\n")
    part.replace(path)


class Sink(Protocol):
    """Takes metrics by step."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of one step."""

    def close(self) -> None:
        """Finish writing."""


class JsonLines:
    """metrics.jsonl: one object a line, with the step."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        """Open the file; lines after step `resumed_at`, of steps that will be taken again, are dropped."""
        kept = [line for line in read_metrics(path) if line["step"] <= resumed_at] if path.exists() else []
        part = path.with_name(path.name + ".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        part.replace(path)
        self.file = open(path, "a")  # noqa: SIM115

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line."""
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("tensorboard=true needs the package: pip install tensorboard") from error
        self.writer = SummaryWriter(str(folder), purge_step=resumed_at + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add one scalar a metric."""
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


class WandB:
    """A Weights & Biases run that bears the run folder's name."""

    def __init__(self, project: str, folder: Path, key: str, config: dict[str, Any]) -> None:
        """Open the run with the id `key`; the same id goes on with the same curves."""
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"wandb={project!r} needs the package: pip install wandb") from error
        self.run = wandb.init(project=project, name=folder.name, id=key, resume="allow", dir=folder, config=config)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics."""
        self.run.log(metrics, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; a last line cut off by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
