"""The GaLore baseline against the published package's recorded trajectory."""

import json
from pathlib import Path

import pytest
import torch
from galore_case import OPTIONS, SHAPES, gradients, weights

from mofasgd.app.galore import GaLore

TRACE = json.loads((Path(__file__).parent / "data" / "galore_trace.json").read_text())


@pytest.mark.parametrize("i", range(len(SHAPES)))
def test_ten_steps_equal_the_published_package(i):
    W = torch.nn.Parameter(weights(SHAPES[i]))
    opt = GaLore([W], **OPTIONS)
    for G, expected in zip(gradients(SHAPES[i]), TRACE["weights"][i], strict=True):
        W.grad = G
        opt.step()
        # Float32 rounding: the same products in another association.
        assert (W - torch.tensor(expected)).abs().max() <= 2e-6


def test_groups_without_rank_are_adamw():
    W, twin = torch.nn.Parameter(weights((9, 9))), torch.nn.Parameter(weights((9, 9)))
    opt, adamw = GaLore([W], lr=0.01, eps=1e-12), torch.optim.AdamW([twin], lr=0.01, eps=1e-12, weight_decay=0.0)
    for G in gradients((9, 9)):
        W.grad, twin.grad = G, G.clone()
        assert opt.step(lambda: 3.0) == 3.0
        adamw.step()
    assert (W - twin).abs().max() <= 1e-6
