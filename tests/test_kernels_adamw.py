"""AdamW's kernel equals `adamw_step`: in Triton's interpreter on a CPU, on the device where there is one."""

import copy

import pytest
import torch
from torch import nn

from mofasgd import MoFaSGD, adamw
from mofasgd.adamw import AdamWMember, AdamWUpdate
from mofasgd.apply import Rounding
from mofasgd.rng import ROUNDING, key_of

pytest.importorskip("triton")
# The interpreter computes masked elements too, and numpy speaks of their 0 / 0 and of the logarithm of beta = 0.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning") for what in ("invalid", "divide by zero")]
kernel = pytest.importorskip("mofasgd.kernels.adamw")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUP = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def state(shape, dtype=torch.float32):
    return {
        "exp_avg": torch.zeros(shape, dtype=dtype, device=DEVICE),
        "exp_avg_sq": torch.zeros(shape, dtype=dtype, device=DEVICE),
        "step": torch.zeros((), device=DEVICE),
    }


def take(monkeypatch, use, params, grads, states, *, group=GROUP, gate=None, factor=None, stochastic=True):
    """Take one step of `params` by the kernel, or by the reference; return the update."""
    monkeypatch.setattr(adamw, "usable", lambda device: use)
    members = [
        AdamWMember(p, g, group, s, Rounding.of(stochastic, 5, index, s["step"]))
        for index, (p, g, s) in enumerate(zip(params, grads, states, strict=True))
    ]
    update = AdamWUpdate(members, gate)
    update.take(factor)
    return update


def both(monkeypatch, params, steps, **options):
    """Take the steps by the kernel and by the reference; return (parameters, states) of each."""
    results = []
    for use in (True, False):
        own = [p.clone() for p in params]
        states = [state(p.shape) for p in params]
        for grads in steps:
            take(monkeypatch, use, own, grads, states, **options)
        results.append((own, states))
    return results


def assert_equal(kernels, references):
    """Moments, counters and bfloat16 weights to the bit; float32 weights up to the CPU's square roots."""
    for p, q in zip(kernels[0], references[0], strict=True):
        if p.dtype is torch.bfloat16:
            assert torch.equal(p, q)
        else:
            # One ulp of four updates of size 0.01 at most, and the rounding of weights below 8.
            assert ((p - q).abs() <= 4 * 2**-30 + 2**-23 * p.abs()).all()
    for s, t in zip(kernels[1], references[1], strict=True):
        assert all(torch.equal(s[name], t[name]) for name in s)


def bits(*tensors):
    return [t.detach().reshape(-1).contiguous().view(torch.uint8).clone() for t in tensors]


def same_bits(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("numel", [1, 7, 2500])
def test_the_kernel_equals_the_reference(monkeypatch, weight, grad, stochastic, numel):
    params = [torch.randn(numel, device=DEVICE).to(weight) for _ in range(3)]
    steps = [[torch.randn(numel, device=DEVICE).to(grad) for _ in params] for _ in range(4)]
    for factor in (None, torch.tensor(0.3, dtype=torch.float64, device=DEVICE)):
        assert_equal(*both(monkeypatch, params, steps, factor=factor, stochastic=stochastic))


@pytest.mark.parametrize("offset", [0, 5, 6])
def test_a_part_of_a_weight_is_rounded_as_in_the_whole(monkeypatch, offset):
    weight, grad = torch.randn(700, device=DEVICE).bfloat16(), torch.randn(700, device=DEVICE)
    part = weight[offset:].clone()
    for use, param, g, start in ((False, weight, grad, 0), (True, part, grad[offset:].clone(), offset)):
        monkeypatch.setattr(adamw, "usable", lambda device, use=use: use)
        own = state(param.shape)
        rounding = Rounding(True, key_of(5, ROUNDING, 0), own["step"], start)
        AdamWUpdate([AdamWMember(param, g, GROUP, own, rounding)], None).take(None)
    assert torch.equal(part, weight[offset:])


def test_nearest_rounding_takes_ties_to_even_and_random_rounding_differs_by_parameter(monkeypatch):
    # 1 - 2^-9 lies in the middle of bfloat16's 1 - 2^-8 and 1, 1 + 2^-8 in that of 1 and 1 + 2^-7.
    for decay, value, expected in ((2**-9, 1.0, 1.0), (2**-8, 1.0, 1 - 2**-8), (3 * 2**-9, 1.0, 1 - 2**-7)):
        params = [torch.full((3,), value, device=DEVICE).bfloat16()]
        group = {**GROUP, "lr": 1.0, "eps": 1e30, "weight_decay": decay}
        take(
            monkeypatch, True, params, [torch.zeros_like(p) for p in params], [state(3)], group=group, stochastic=False
        )
        assert params[0].tolist() == [expected] * 3
    params = [torch.ones(1000, device=DEVICE).bfloat16() for _ in range(2)]
    group = {**GROUP, "lr": 1e-3}
    take(monkeypatch, True, params, [torch.ones_like(p) for p in params], [state(1000) for _ in params], group=group)
    assert not torch.equal(*params)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1000, 1024])
def test_views_that_16_bytes_do_not_divide_are_stepped_within_their_bounds(monkeypatch, weight, numel):
    def misaligned(source):
        whole = torch.full((numel + 9,), 7.0, device=DEVICE, dtype=source.dtype)
        whole[1 : numel + 1] = source
        return whole

    starts = [torch.randn(numel, device=DEVICE).to(weight) for _ in range(2)]
    grads = [torch.randn(numel, device=DEVICE).to(weight) for _ in range(2)]
    wholes, states = [misaligned(s) for s in starts], [state(numel) for _ in range(2)]
    own = [w[1 : numel + 1] for w in wholes]
    take(monkeypatch, True, own, [misaligned(g)[1 : numel + 1] for g in grads], states)
    expected, expected_states = [s.clone() for s in starts], [state(numel) for _ in range(2)]
    take(monkeypatch, False, expected, grads, expected_states)
    assert_equal((own, states), (expected, expected_states))
    assert all((w[0] == 7).all() and (w[numel + 1 :] == 7).all() for w in wholes)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_what_does_not_move_keeps_every_bit(monkeypatch, weight):
    params = [torch.randn(50, device=DEVICE).to(weight) for _ in range(3)]
    for p in params:
        p[:3] = torch.tensor([-0.0, float("nan"), float("inf")])
    grads = [torch.randn(50, device=DEVICE) for _ in params]
    grads[1][49] = float("nan")
    states = [state(50) for _ in params]
    for s in states:
        s["exp_avg"][:2] = torch.tensor([-0.0, 1e-42])
        s["step"] += 3
    before = [bits(p, *s.values()) for p, s in zip(params, states, strict=True)]
    update = take(monkeypatch, True, params, grads, states)
    after = [bits(p, *s.values()) for p, s in zip(params, states, strict=True)]
    assert [same_bits(b, a) for b, a in zip(before, after, strict=True)] == [False, True, False]
    assert [s["step"].item() for s in states] == [4, 3, 4]
    assert update.finite.tolist() == update.active.tolist() == [True, False, True]
    assert (update.square_norms[1] == 0).item()

    update = take(monkeypatch, True, params, grads, states, gate=torch.tensor(False, device=DEVICE))
    now = [bits(p, *s.values()) for p, s in zip(params, states, strict=True)]
    assert all(same_bits(a, b) for a, b in zip(after, now, strict=True))
    assert update.finite.tolist() == [True, False, True]
    assert not update.active.any()


def test_options_may_be_tensors_of_one_element(monkeypatch):
    params, steps = [torch.randn(40, device=DEVICE)], [[torch.randn(40, device=DEVICE)] for _ in range(3)]
    f64 = {"dtype": torch.float64, "device": DEVICE}
    every = {
        "lr": torch.tensor([0.01], **f64),
        "betas": (torch.tensor(0.9, **f64), torch.tensor(0.999, **f64)),
        "eps": torch.tensor(1e-8, **f64),
        "weight_decay": torch.tensor(0.1, **f64),
    }
    expected = both(monkeypatch, params, steps)
    for group in (every, {**GROUP, "lr": every["lr"]}, {**GROUP, "lr": torch.tensor(0.01, dtype=torch.float64)}):
        found = both(monkeypatch, params, steps, group=group)
        assert same_bits(bits(*expected[0][0]), bits(*found[0][0]))
        assert_equal(*found)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.95, 0.0)])
def test_steps_equal_torchs_adamw(monkeypatch, betas):
    params = [torch.randn(30, 7, device=DEVICE) for _ in range(2)]
    twins = [nn.Parameter(p.clone()) for p in params]
    other = torch.optim.AdamW(twins, lr=0.01, betas=betas, eps=1e-6, weight_decay=0.1)
    states, group = [state(p.shape) for p in params], {**GROUP, "betas": betas, "eps": 1e-6}
    for _ in range(20):
        grads = [torch.randn_like(p) for p in params]
        take(monkeypatch, True, params, grads, states, group=group)
        for twin, g in zip(twins, grads, strict=True):
            twin.grad = g
        other.step()
    # The same formula in another order: a few float32 roundings; without beta2 steps, and weights, may be large.
    assert all(torch.allclose(p, q, rtol=2e-6, atol=1e-6) for p, q in zip(params, twins, strict=True))


def test_bias_corrections_are_those_of_float64(monkeypatch):
    # In float32 1 - 0.999 is 1.3e-5 off, and with it the first step.
    for use in (True, False):
        params = [torch.zeros(3, device=DEVICE)]
        group = {"lr": 1.0, "betas": (0.999, 0.9), "eps": 0.0, "weight_decay": 0.0}
        take(monkeypatch, use, params, [torch.full((3,), 0.5, device=DEVICE)], [state(3)], group=group)
        assert (params[0] + 1).abs().max() <= 3e-7


def model(device=DEVICE, dtype=torch.bfloat16):
    """Parameters of two sizes, three of them outside the kernel's reach."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(s, generator=generator) for s in ((12, 5), (60,), (5, 12), (7,), (6, 10), (60,), (0,))]
    params = [nn.Parameter(d.to(device, dtype)) for d in draws]
    params[4] = nn.Parameter(draws[4].to(device, dtype).T)  # no contiguous memory
    params[5] = nn.Parameter(draws[5].to(device, torch.float64))
    return params


def train(params, steps=3, seed=0, **options):
    generator = torch.Generator().manual_seed(1)
    groups = [{"params": params[:4], "algorithm": "adamw", "lr": 0.02}, {"params": params[4:], "algorithm": "adamw"}]
    opt = MoFaSGD(groups, lr=0.01, weight_decay=0.1, seed=seed, **options)
    for i in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        if i == 1:
            params[1].grad[3] = float("inf")
        opt.step()
    return opt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_with_the_kernel_equals_one_without(monkeypatch, dtype):
    calls, results, launch = [], [], kernel.adamw_list
    monkeypatch.setattr(kernel, "adamw_list", lambda *args, **rest: (calls.append(len(args[0])), launch(*args, **rest)))
    for use in (True, False):
        monkeypatch.setattr(adamw, "usable", lambda device, use=use: use)
        params = model(dtype=dtype)
        opt = train(params, max_grad_norm=1.0)
        results.append((params, [opt.state[p] for p in params], opt.grad_norm(), opt.nonfinite_steps))
    # The first group's three parameters of one size share a launch, of which one does not move; the second has none.
    assert calls == [3, 1] * 3
    assert_equal(*([r[0], r[1]] for r in results))
    # The reference adds the parameters' norms in another order.
    assert results[0][2].item() == pytest.approx(results[1][2].item(), rel=1e-12)
    assert results[0][3] == results[1][3] == 1


def test_a_state_that_the_kernel_cannot_read_is_stepped_by_the_reference(monkeypatch):
    monkeypatch.setattr(adamw, "usable", lambda device: True)
    p, g = torch.ones(6, device=DEVICE), torch.ones(6, device=DEVICE)

    def fits(param=p, grad=g, **changes):
        return AdamWMember(param, grad, GROUP, state(6) | changes, Rounding.of(True, 0, 0, None)).bucket() is not None

    assert fits()
    assert not fits(param=p.double())
    assert not fits(grad=g.double())
    assert not fits(exp_avg=torch.zeros(6, dtype=torch.float64, device=DEVICE))
    assert not fits(exp_avg_sq=torch.zeros(12, device=DEVICE)[::2])
    assert not fits(step=torch.zeros((), dtype=torch.float64, device=DEVICE))
    assert not fits(grad=g[:1].expand(6))
    # 2^33 elements, which no machine holds: the kernel's numbers of random words would repeat.
    assert not fits(param=torch.empty(1 << 33, dtype=torch.bfloat16, device="meta"))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_on_the_device_equals_the_cpus(dtype):
    ours, theirs = model(dtype=dtype), model(torch.device("cpu"), dtype)
    for params in (ours, theirs):
        train(params, steps=10, max_grad_norm=1.0)
    for p, q in zip(ours, theirs, strict=True):
        difference = (p.cpu().double() - q.double()).abs()
        if p.dtype is torch.bfloat16:
            # The same random words: a float32 ulp of the step seldom crosses a threshold, and then by one neighbour.
            assert (difference > 0).sum() <= 1
            assert (difference <= 2**-7 * q.abs()).all()
        elif p.numel():
            assert difference.max() <= 1e-6


@pytest.mark.gpu
@needs_cuda
def test_a_step_on_the_device_waits_for_nothing():
    params = model()
    opt = train(params, max_grad_norm=1.0)
    for rate in (0.03, torch.tensor(0.01, device=DEVICE)):
        opt.param_groups[0]["lr"] = rate
        for p in params:
            p.grad = torch.randn_like(p)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            # New gradients and a new lr: nothing of this step has been copied to the device before.
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert opt.nonfinite_steps == 1


@pytest.mark.gpu
@needs_cuda
def test_a_captured_step_follows_its_tensors():
    params = [nn.Parameter(torch.randn(64, device=DEVICE).bfloat16()) for _ in range(3)]
    lr = torch.tensor(0.01, device=DEVICE)
    twins = copy.deepcopy(params)
    opts = [MoFaSGD([{"params": ps, "algorithm": "adamw", "lr": lr}], max_grad_norm=1.0) for ps in (params, twins)]
    grads = [torch.randn(64, device=DEVICE).bfloat16() for _ in params]
    for ps in (params, twins):
        for p, g in zip(ps, grads, strict=True):
            p.grad = g.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        opts[0].step()
    torch.cuda.current_stream().wait_stream(side)
    opts[1].step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opts[0].step()
    for rate in (0.1, 0.001):
        lr.fill_(rate)
        for ps in (params, twins):
            for p in ps:
                p.grad.mul_(-0.5)
        graph.replay()
        opts[1].step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@pytest.mark.gpu
@needs_cuda
def test_the_number_of_launches_does_not_grow_with_that_of_parameters():
    def launches(count):
        params = [nn.Parameter(torch.randn(64, device=DEVICE)) for _ in range(count)]
        opt = MoFaSGD([{"params": params, "algorithm": "adamw"}], max_grad_norm=1.0)
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            opt.step()
            torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)

    assert 0 < launches(4) == launches(50) <= 40
