"""Two processes (gloo, DDP): replicas agree with each other and with one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from hf_case import arguments, logged, make, trainer_of


def test_two_processes_train_alike_and_as_one_does(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "hf_ranks.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    (refused, weights, norms), (_, others, same_norms) = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    assert "2 processes" in refused
    assert "attach='none'" in refused
    assert norms == same_norms
    assert all(torch.equal(value, others[key]) for key, value in weights.items())
    model = make("bert")
    alone = trainer_of(model, arguments(tmp_path, max_steps=6), attach="none")
    alone.train()
    # The same eight rows a step, summed in another order.
    assert norms[:5] == pytest.approx(logged(alone)[:5], rel=1e-4)
