"""What must hold on a CUDA device: the same numbers as on the CPU, and true float32 whatever TF32 says."""

import pickle

import numpy as np
import pytest
import torch
from test_robustness import assert_sound, kinds_of_gradient
from torch import nn

from mofasgd import MoFaSGD
from mofasgd.apply import stochastic_bfloat16
from mofasgd.rng import gaussian, random_words

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = [(300, 200), (20, 12), (3, 200, 150), (200,)]


def train(device, dtype=torch.float32, steps=10, **options):
    rng = np.random.default_rng(0)
    params = [nn.Parameter(torch.from_numpy(rng.standard_normal(s)).to(device, dtype)) for s in SHAPES]
    opt = MoFaSGD([{"params": params[:-1]}, {"params": params[-1:], "algorithm": "adamw"}], rank=4, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.from_numpy(rng.standard_normal(p.shape)).to(device, dtype)
        opt.step()
    return [p.detach().cpu() for p in params], opt


def test_random_numbers_are_bit_equal_to_the_cpus():
    start = (1 << 33) - 500
    assert torch.equal(random_words(7, 3, start, 1000, CPU), random_words(7, 3, start, 1000, CUDA).cpu())
    assert torch.equal(gaussian(37, 11, 5, CPU, torch.float32), gaussian(37, 11, 5, CUDA, torch.float32).cpu())
    x, words = torch.randn(1000), random_words(7, 3, 0, 1000, CPU)
    assert torch.equal(stochastic_bfloat16(x, words), stochastic_bfloat16(x.cuda(), words.cuda()).cpu())


@pytest.mark.parametrize("complement", [0.0, 1.0])
def test_ten_steps_equal_the_cpus_in_float64(complement):
    options = {"state_dtype": torch.float64, "complement": complement, "max_grad_norm": 1.0, "weight_decay": 0.1}
    ours, _ = train(CUDA, torch.float64, **options)
    theirs, _ = train(CPU, torch.float64, **options)
    assert all((a - b).abs().max() <= 1e-9 for a, b in zip(ours, theirs, strict=True))


def test_tf32_and_autocast_change_no_bit():
    expected, _ = train(CUDA, complement=1.0)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found, _ = train(CUDA, complement=1.0)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_two_runs_with_bfloat16_weights_are_bit_equal():
    first, _ = train(CUDA, torch.bfloat16, complement=1.0)
    second, _ = train(CUDA, torch.bfloat16, complement=1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(60, 50), (9, 7), (5, 4, 6), (300, 200)])
def test_hard_gradients_leave_no_nan(shape):
    W = nn.Parameter(torch.randn(shape, device=CUDA))
    opt = MoFaSGD([W], lr=0.01, rank=4, complement=2.0, lr_scale="match_rms_adamw", max_grad_norm=1e3)
    for i in range(100):
        W.grad = torch.as_tensor(kinds_of_gradient(shape, i)).float().cuda()
        opt.step()
    W.data = W.data.cpu()
    opt.load_state_dict(opt.state_dict())  # moves the state beside the weight
    assert_sound(opt, W)
    assert opt.nonfinite_steps == 10


def running(rank, complement=0.0):
    """Return an optimizer of all kinds of parameters whose matrices have started, and what makes new gradients."""
    shapes = [(256, 192), (256, 192), (3, 128, 96), (192,), (40, 24)]
    params = [nn.Parameter(torch.randn(s, device=CUDA, dtype=torch.bfloat16)) for s in shapes]
    groups = [{"params": params[:3], "complement": complement}, {"params": params[3:], "algorithm": "adamw"}]
    opt = MoFaSGD(groups, lr=torch.tensor(0.01, device=CUDA), rank=rank, max_grad_norm=1.0, weight_decay=0.01)
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(3):
        opt.step()
    return opt, params


@pytest.mark.parametrize("rank", [8, 32, 80])
@pytest.mark.parametrize("complement", [0.0, 1.0])
def test_a_step_waits_for_nothing_once_all_have_started(rank, complement):
    opt, params = running(rank, complement)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rank", [8, 32])
def test_a_step_can_be_captured_and_reads_new_gradients_and_rates(rank):
    opt, params = running(rank)
    other, copies = running(rank)
    for p, q in zip(params, copies, strict=True):
        q.data.copy_(p)
        q.grad.copy_(p.grad)
    other.load_state_dict(opt.state_dict())
    other.step()
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for rate in (0.01, 0.003):
        for p, q in zip(params, copies, strict=True):
            p.grad.normal_()
            q.grad.copy_(p.grad)
        for some in (opt, other):
            some.param_groups[0]["lr"].fill_(rate)
        graph.replay()
        other.step()
        torch.cuda.synchronize()
        assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def stack(width=1024, layers=8):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).cuda()


def steps(model, mode, count=4):
    """Train `model` attached in `mode` (None: dense); return the optimizer and each step's peak above the start."""
    opt = MoFaSGD(model.parameters(), lr=0.01, rank=8, max_grad_norm=1.0)
    if mode:
        opt.attach(model, mode=mode)
    x, peaks = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).cuda(), []
    for _ in range(count):
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(x).square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated() - start)
        opt.step()
        opt.zero_grad()
    return opt, peaks


@pytest.mark.parametrize("mode", ["sketch", "release"])
def test_attached_steps_equal_dense_ones(mode):
    start = torch.cat([p.detach().flatten() for p in stack().parameters()])
    models = [stack(), stack()]
    for model, kind in zip(models, (None, mode), strict=True):
        steps(model, kind)
    dense, attached = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    # Rounding of float32 sketches, made in another order, as on the CPU (tests/test_attach.py).
    assert (attached - dense).norm() <= 1e-4 * (dense - start).norm()


@pytest.mark.parametrize("mode", ["sketch", "release"])
def test_sketches_of_bfloat16_layers_are_not_rounded_to_it(mode):
    model = nn.Sequential(nn.Linear(512, 256, bias=False), nn.Linear(256, 512, bias=False)).to("cuda", torch.bfloat16)
    opt = MoFaSGD(model.parameters(), lr=0.01, rank=8)
    handle = opt.attach(model, mode)
    held = 0
    for _ in range(2):
        for _ in range(2):
            model(torch.randn(3, 8, 512, device="cuda", dtype=torch.bfloat16)).square().sum().backward()
        for param, window in handle._windows.items():
            if not window.pending:
                for total in window.sketches(opt.state[param]["U"], opt.state[param]["V"]):
                    # Of sums of random numbers 1 in 65536 is a bfloat16.
                    assert total.dtype is torch.float32
                    assert (total == total.bfloat16()).float().mean() < 0.01
                    held += 1
        opt.step()
        opt.zero_grad()
    assert held == 4


def test_release_makes_no_float32_copy_of_a_bfloat16_gradient():
    weight = nn.Parameter(torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16))
    model = nn.ParameterDict({"weight": weight})
    opt = MoFaSGD([weight], lr=0.01, rank=8)
    handle = opt.attach(model, "release")
    G = torch.randn_like(weight)
    for _ in range(2):
        handle._windows[weight].add(G)
        opt.step()
        opt.zero_grad()
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    handle._windows[weight].add(G)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - start < G.nbytes / 4
    U, V = (opt.state[weight][key].bfloat16().double() for key in "UV")
    for found, expected in zip(handle._windows[weight]._sketches, (G.double() @ V, G.double().T @ U), strict=True):
        torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_allocator_sees_no_gradient_in_sketch_mode():
    weight = 1024 * 1024 * 4
    _, dense = steps(stack(), None)
    _, attached = steps(stack(), "sketch")
    assert min(dense) >= 8 * weight
    # One layer's test matrices, the sketches of all, and activations of 64 rows: less than one gradient.
    assert max(attached) < weight


def test_a_recording_of_the_memory_names_the_allocations(tmp_path):
    from mofasgd.snapshot import check_recordable, save_recording, start_recording

    check_recordable("memory_history", torch.device("cuda"))
    start_recording()
    held = torch.empty(3 * 2**20, device="cuda")
    save_recording(tmp_path / "new" / "memory.pickle")
    after = torch.empty(5 * 2**20, device="cuda")
    content = pickle.loads((tmp_path / "new" / "memory.pickle").read_bytes())
    sizes = [entry["size"] for trace in content["device_traces"] for entry in trace if entry["action"] == "alloc"]
    assert held.nbytes in sizes
    assert after.nbytes not in sizes


def test_an_expert_that_no_token_reaches_stays_as_it_is():
    experts = nn.ModuleList(nn.Linear(64, 48, bias=False) for _ in range(2)).to(CUDA, torch.bfloat16)
    opt = MoFaSGD(experts.parameters(), lr=0.1, rank=8)
    opt.attach(experts, mode="sketch")
    for _ in range(3):
        before = [expert.weight.detach().clone() for expert in experts]
        x = torch.randn(5, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        (experts[0](x).square().sum() + experts[1](x[:0]).sum()).backward()
        opt.step()
        opt.zero_grad()
        assert not torch.equal(before[0], experts[0].weight)
        assert torch.equal(before[1], experts[1].weight)
