"""Problems with a known answer converge, and the example trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mofasgd import MoFaSGD, param_groups

ROOT = Path(__file__).parents[1]


def descend(opt, loss_of, steps):
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1 - i / steps)
    first = loss_of().item()
    for _ in range(steps):
        opt.zero_grad()
        loss_of().backward()
        opt.step()
        schedule.step()
    return loss_of().item() / first


@pytest.mark.parametrize("complement", [0.0, 1.0])
def test_linear_regression_converges(complement):
    X, W = torch.randn(200, 20), torch.randn(15, 20)
    model = nn.Linear(20, 15)
    opt = MoFaSGD(param_groups(model, rank=4, lr=0.05, adamw_lr=0.01, complement=complement))
    assert descend(opt, lambda: (model(X) - X @ W.T).square().mean(), 600) <= 1e-3


def test_matrix_factorization_converges():
    target = torch.randn(40, 5) @ torch.randn(5, 30)
    A, B = nn.Parameter(torch.randn(40, 8) / 3), nn.Parameter(torch.randn(8, 30) / 3)
    assert descend(MoFaSGD([A, B], lr=0.1, rank=4), lambda: (A @ B - target).square().mean(), 400) <= 1e-3


@pytest.mark.parametrize("options", [[], ["--complement", "2"], ["--optimizer", "adamw"]])
def test_the_example_runs_and_prints_the_validation_loss(options):
    command = [sys.executable, str(ROOT / "examples" / "train_gpt.py"), "--steps", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    last = done.stdout.strip().splitlines()[-1]
    assert "validation loss" in last
    # Untrained it is log(256) = 5.545.
    assert 2.0 < float(last.split("loss ")[1].split()[0]) < 5.3


def test_the_recorded_comparison_says_what_the_documents_claim():
    table = json.loads((ROOT / "docs" / "results" / "byte_gpt.json").read_text())["table"]
    loss = {row["method"]: row["loss"] for row in table}
    for rank in (8, 32):
        assert loss[f"mofasgd r{rank} c2"] <= loss["adamw"]
        assert loss[f"mofasgd r{rank}"] < loss[f"galore r{rank}"]
    page = (ROOT / "docs" / "complement.md").read_text()
    assert all(f"{row['loss']:.3f} ± {row['std']:.3f}" in page for row in table)
