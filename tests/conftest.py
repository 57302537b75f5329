"""One thread per test process: the suite runs in parallel, and small matrices gain nothing from more."""

import os

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Kernels then run on the CPU; Triton reads this when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
