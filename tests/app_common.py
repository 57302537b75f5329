"""A run of `mofasgd pretrain` small enough for a test."""

import json
import time

import pytest
import torch
import yaml

from mofasgd.app.config import DataConfig, ModelConfig, OptimizerConfig, PretrainConfig
from mofasgd.app.display import Display
from mofasgd.app.run import train

TEXT = b"".join(b"%d squared is %d.\n" % (i, i * i) for i in range(200))


def tiny(folder, *, optimizer=None, data=None, **options):
    """Return the configuration of a run of 8 steps on a text file in `folder`."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_bytes(TEXT)
    defaults = {"steps": 8, "batch_size": 4, "eval_every": 4, "log_every": 2, "device": "cpu", "out": folder / "run"}
    return PretrainConfig(
        model=ModelConfig(layers=1, width=16, heads=2),
        data=DataConfig(**{"train": str(text), "context": 16, "cache": folder / "cache"} | (data or {})),
        optimizer=OptimizerConfig(**({"name": "mofasgd", "rank": 4} if optimizer is None else optimizer)),
        **(defaults | options),
    )


def run_quietly(config):
    return train(config, Display(quiet=True))


def unfinish(out):
    """Take the result out of a run's record, as if it had been killed right after its last checkpoint."""
    record = json.loads((out / "run.json").read_text())
    del record["result"]
    (out / "run.json").write_text(json.dumps(record))


def final_weights(out):
    newest = max((out / "checkpoints").glob("step-*.pt"))
    return torch.load(newest, weights_only=True)["model"]


def metrics(out):
    """Return the lines of metrics.jsonl without what depends on the clock."""
    clock = ("seconds", "tokens_per_second", "peak_mb")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def _filled(path):
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:  # an older checkpoint, which has made room since
        return False


def wait_for(process, folder, pattern):
    """Wait until `process` has written something into a file of `folder`."""
    end = time.monotonic() + 120
    while not any(map(_filled, folder.glob(pattern))):
        if process.poll() is not None:
            pytest.fail(f"ended with status {process.returncode}: {process.stderr.read()}")
        assert time.monotonic() < end, f"no {pattern} after two minutes"
        time.sleep(0.05)


def write_config(config, path):
    from mofasgd.app.identity import plain

    path.write_text(yaml.safe_dump(plain(config)))
    return path
