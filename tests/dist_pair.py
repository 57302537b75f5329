"""Starts the two processes of the tests with ranks."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.distributed import TCPStore


def meeting_point():
    """Return the store by which ranks find each other, on a port that the system has chosen.

    Here and not in rank 0, as torchrun does it: a port that is looked for first and bound by a rank later may be
    somebody else's by then.
    """
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def torchrun_environment(store, rank, world):
    """Return what torchrun would tell a rank of one machine."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in (place | meeting).items()}


def save_apart(folder, arguments, environment):
    """Run `python *arguments(rank)` for both ranks; return what each has saved as rank0.pt or rank1.pt in `folder`.

    Args:
        folder: for what they save and print.
        arguments: of the interpreter, by rank.
        environment: variables beside this process's, by rank.
    """
    # Into files: a rank whose pipe is full would wait until it is read, and the other one for it.
    outputs = [folder / f"rank{rank}.txt" for rank in range(2)]
    processes = []
    try:
        for rank, output in enumerate(outputs):
            variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment(rank)}
            with open(output, "w") as file:
                command = [sys.executable, *map(str, arguments(rank))]
                processes.append(subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT))
        end = time.monotonic() + 240
        for process in processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
            if process.returncode:
                break
    finally:
        for process in processes:
            process.kill()
            process.wait()
    status = [process.returncode for process in processes]
    assert status == [0, 0], (status, *(output.read_text(errors="replace")[-3000:] for output in outputs))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False, map_location="cpu") for rank in range(2)]


def run_pair(module, folder, backend="gloo"):
    """Return the results of both ranks for the cases of `module`, on the CPU (gloo) or on two GPUs (nccl)."""
    script = Path(__file__).parent / "dist_ranks.py"
    # A host name that resolves to nothing must not matter.
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return save_apart(folder, lambda rank: [script, module, rank, folder, backend], lambda rank: loopback)
