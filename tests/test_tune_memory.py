"""Recorded memory: what is held is told apart, for every way of training, and adds up."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from mofasgd import MoFaSGD, param_groups
from mofasgd.memory import CATEGORIES, Recorder, draw, summary

WIDTH, ROWS = 64, 32
MATRIX = 4 * WIDTH * WIDTH


def model():
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))


def record(net, opt, steps=3, micro=1):
    """Record `steps` steps; return what of each category was alive after each last backward, and the timeline."""
    held = []
    with Recorder(net, opt) as recorder:
        for _ in range(steps):
            for _ in range(micro):
                net(torch.ones(ROWS, WIDTH)).square().mean().backward()
            held.append(len(recorder.events))
            opt.step()
            opt.zero_grad()
    timeline = recorder.timeline()
    return [{c: timeline.sizes[c][number - 1] for c in CATEGORIES} for number in held], timeline


def test_adamw_holds_weights_gradients_and_two_moments():
    net = model()
    held, timeline = record(net, torch.optim.AdamW(net.parameters()), micro=2)
    assert [h["weights"] for h in held] == [3 * MATRIX] * 3
    assert [h["gradients"] for h in held] == [3 * MATRIX] * 3
    # From the first step on, with a counter a matrix.
    assert [h["optimizer state"] // MATRIX for h in held] == [0, 6, 6]
    assert all(h["sketches"] == 0 for h in held)
    # The inputs of three layers, and of the square: kept for backward, and gone after it.
    assert max(timeline.sizes["activations"]) >= 4 * 4 * ROWS * WIDTH
    assert timeline.sizes["activations"][-1] == 0
    assert len(timeline.steps) == 3


def test_attached_mofasgd_holds_sketches_in_place_of_gradients():
    net, rank = model(), 4
    opt = MoFaSGD(param_groups(net, rank=rank, lr=0.01))
    handle = opt.attach(net)
    held, timeline = record(net, opt)
    assert all(h["gradients"] == 0 for h in held)
    assert max(timeline.sizes["gradients"]) == 0
    # With a momentum: two sketches a matrix, what the handle says it holds, and probes of one number for each.
    pair = 2 * 4 * WIDTH * rank
    assert held[-1]["sketches"] == 3 * (pair + 2 * 4)
    net(torch.ones(ROWS, WIDTH)).square().mean().backward()
    assert handle.nbytes == 3 * pair
    with Recorder(net, opt) as later:
        pass
    # Recording may begin within a run: what is held already is known.
    assert later.timeline().sizes["sketches"][-1] == held[-1]["sketches"]
    factors = 3 * 4 * (2 * WIDTH * rank + rank)
    assert factors <= held[-1]["optimizer state"] < factors + 200


def test_recording_changes_nothing_and_ends():
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        net = model()
        opt = MoFaSGD(param_groups(net, rank=4, lr=0.01))
        opt.attach(net)
        if recorded:
            record(net, opt)
            assert not opt._optimizer_step_pre_hooks
            assert not opt._optimizer_step_post_hooks
        else:
            for _ in range(3):
                net(torch.ones(ROWS, WIDTH)).square().mean().backward()
                opt.step()
                opt.zero_grad()
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_all_that_is_made_is_counted_until_it_is_freed():
    net = model()
    big = 4 * 1000 * 1000
    with Recorder(net, torch.optim.SGD(net.parameters())) as recorder:
        kept = torch.ones(1000, 1000)
        view = kept[:10]
        del kept
        other = torch.zeros(1000, 1000)
        del other
    timeline = recorder.timeline()
    # A view keeps its storage.
    assert timeline.total()[-1] == 3 * MATRIX + big
    found = summary(timeline)
    assert found["peak_mb"] == pytest.approx((3 * MATRIX + 2 * big) / 1e6, abs=1e-3)
    assert found["at_peak_mb"]["temporaries"] == pytest.approx(2 * big / 1e6, abs=1e-3)
    assert sum(found["at_peak_mb"].values()) == pytest.approx(found["peak_mb"], abs=0.01)
    assert view.shape == (10, 1000)


def test_the_picture_keeps_the_peak_however_many_events(tmp_path):
    net = model()
    with Recorder(net, torch.optim.SGD(net.parameters())) as recorder:
        for i in range(2000):
            held = torch.ones(10**6 if i == 777 else 10)
    del held
    from mofasgd.memory.draw import _moments

    timeline = recorder.timeline()
    moments = _moments(timeline)
    assert len(moments) < len(timeline.times)
    assert max(timeline.total()[i] for i in moments) == max(timeline.total())
    draw(timeline, "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_command_writes_picture_and_table(tmp_path, capsys):
    pytest.importorskip("trl")
    from tune_case import save_llama

    from mofasgd.app.tune.config import ProfileConfig
    from mofasgd.app.tune.profile import profile

    save_llama(tmp_path / "model")
    profile(ProfileConfig(model=str(tmp_path / "model"), out=tmp_path, rank=4, context=16, batch_size=2, device="cpu"))
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["steps"] == 3
    assert (tmp_path / "memory.png").exists()
    weights = (tmp_path / "model" / "model.safetensors").stat().st_size / 1e6
    assert found["at_peak_mb"]["weights"] == pytest.approx(weights, rel=0.05)
    shown = capsys.readouterr().out
    assert all(category in shown for category in CATEGORIES)
