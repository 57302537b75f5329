"""One thread per test process: the suite runs in parallel, and small matrices gain nothing from more."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
