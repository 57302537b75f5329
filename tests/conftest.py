"""One thread per test process: the suite runs in parallel, and small matrices gain nothing from more."""

import os
import signal
import subprocess

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Kernels then run on the CPU; Triton reads this when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def start_process():
    """Return a function that starts a process, of one thread, with pipes; it ends with the test, however that ends."""
    started = []

    def start(command):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # A group of its own: to be interrupted as by a terminal, or killed, with all that it has started.
        started.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            # A launcher ends its ranks, which may have groups of their own.
            process.terminate()
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
