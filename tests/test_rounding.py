"""Random numbers and stochastic rounding: reproducible, unbiased, and enough for bfloat16 weights to train."""

import numpy as np
import pytest
import torch
from torch import nn

from mofasgd import MoFaSGD, adamw, apply, rng
from mofasgd.apply import Rounding, stochastic_bfloat16
from mofasgd.gradient import FirstWindow
from mofasgd.layout import MatrixShape
from mofasgd.rng import gaussian, hash_word, hash_words, key_of, key_tensor, random_words

CPU = torch.device("cpu")


def reference_word(key, step, element):
    """The same hash in Python's integers."""
    first = hash_word(step ^ key)
    second = hash_word(first ^ hash_word(key))
    return hash_word((element & 0xFFFFFFFF) ^ first ^ hash_word(element >> 32)) ^ second


def test_words_equal_the_hash_in_python_integers():
    words = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 123456789], dtype=torch.int32)
    assert (hash_words(words).numpy().view(np.uint32) == [hash_word(w & 0xFFFFFFFF) for w in words.tolist()]).all()
    key, start = key_of(seed=(5 << 32) + 3, purpose=1, index=7), (1 << 32) - 3
    found = random_words(key, torch.tensor(9.0), start, 6, CPU).numpy().view(np.uint32)
    assert found.tolist() == [reference_word(key, 9, start + i) for i in range(6)]


def test_words_differ_by_seed_purpose_index_step_and_half_of_the_seed():
    keys = {key_of(s, p, i) for s in (0, 1, 1 << 32) for p in (1, 2, 3) for i in range(50)}
    assert len(keys) == 450
    streams = [random_words(key, step, 0, 1000, CPU) for key in list(keys)[:4] for step in range(4)]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            # 1,000 pairs of fair bits agree 500 +- 16 times; six deviations.
            for bit in (0, 7, 15, 31):
                assert abs(((a >> bit) & 1).eq((b >> bit) & 1).sum().item() - 500) < 96


def test_gaussian_has_the_moments_of_a_gaussian_and_no_correlation():
    x = gaussian(1000, 400, key_of(0, 2, 0), CPU, torch.float64).numpy()
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs(x.var() - 1) < 0.01
    assert abs((x**4).mean() - (3 - 0.15)) < 0.03
    spectrum = np.linalg.svd(x / np.sqrt(1000), compute_uv=False)
    # Marchenko-Pastur edges 1 -+ sqrt(0.4).
    assert spectrum[0] == pytest.approx(1 + 0.4**0.5, abs=0.05)
    assert spectrum[-1] == pytest.approx(1 - 0.4**0.5, abs=0.05)


@pytest.mark.parametrize("value", [1.0, -1.0, 3e-30, -7e20])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_rounding_is_unbiased_and_to_a_neighbour(value, part):
    low = torch.tensor(value, dtype=torch.bfloat16)
    gap = torch.nextafter(low, low * 2).double() - low.double()
    x = (low.double() + part * gap).float()
    n = 100_000
    rounded = stochastic_bfloat16(x.expand(n), random_words(3, 1, 0, n, CPU)).double()
    up = ((rounded - low.double()) / gap).round()
    assert set(up.unique().tolist()) <= {0.0, 1.0}
    # Six standard deviations of a binomial mean, and the 2^-17 of 16 random bits.
    assert up.mean().item() == pytest.approx(part, abs=6 * (part * (1 - part) / n) ** 0.5 + 2**-16)


def test_exact_values_infinities_and_nan_are_kept():
    x = torch.tensor([0.0, -0.0, 1.5, float("inf"), -float("inf"), float("nan"), 1e-40])
    x[-1] = x[-1].to(torch.bfloat16).float()
    rounded = stochastic_bfloat16(x.repeat(1000), random_words(1, 1, 0, 7000, CPU)).float()
    assert torch.equal(rounded.nan_to_num(nan=7.0), x.repeat(1000).nan_to_num(nan=7.0))


def train(dtype, steps=400, lr=2e-5, **options):
    """Small steps along one direction, with decay: each is a small fraction of a bfloat16 last place."""
    torch.manual_seed(0)
    W, b = (nn.Parameter((1 + torch.rand(s)).to(dtype)) for s in ((40, 30), (500,)))
    G, g = torch.ones(40, 30, dtype=dtype), torch.ones(500, dtype=dtype)
    groups = [{"params": [W], "lr_scale": "match_rms_adamw"}, {"params": [b], "algorithm": "adamw"}]
    opt = MoFaSGD(groups, lr=lr, rank=2, weight_decay=2.0, **options)
    for _ in range(steps):
        W.grad, b.grad = G, g
        opt.step()
    return W.detach(), b.detach()


def test_bfloat16_weights_follow_the_float32_run_in_the_mean_and_stall_without():
    exact, rounded = train(torch.float32), train(torch.bfloat16)
    nearest = train(torch.bfloat16, stochastic_rounding=False)
    begin = train(torch.bfloat16, steps=0)
    for i in range(2):
        moved = (exact[i] - train(torch.float32, steps=0)[i]).mean()
        found = (rounded[i].float() - begin[i].float()).mean()
        # Mostly the decay; without rounding at random the weight does not move at all.
        assert found.item() == pytest.approx(moved.item(), rel=0.1)
        assert torch.equal(nearest[i], begin[i])


@pytest.mark.parametrize("complement", [0.0, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_step_of_bfloat16_weights_is_the_rounded_step_of_float32_weights(complement, decay):
    def step(dtype, stochastic):
        torch.manual_seed(0)
        W, b = (nn.Parameter(torch.randn(s).bfloat16().to(dtype)) for s in ((60, 50), (500,)))
        groups = [{"params": [W], "complement": complement}, {"params": [b], "algorithm": "adamw"}]
        opt = MoFaSGD(groups, lr=0.05, rank=4, weight_decay=decay, stochastic_rounding=stochastic)
        for p in (W, b):
            p.grad = torch.randn(p.shape).bfloat16().to(dtype)
        opt.step()
        return W.detach(), b.detach()

    exact, nearest, rounded = (
        step(*case) for case in ((torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True))
    )
    for e, n, r in zip(exact, nearest, rounded, strict=True):
        assert torch.equal(n, e.bfloat16())
        # To one of the two neighbours, and without a bias: the errors of n numbers of one last place each.
        ulp = e.abs().log2().floor().exp2() * 2**-7
        assert ((r.float() - e).abs() < ulp).all()
        assert abs(((r.float() - e) / ulp).mean()) < 6 * 0.5 / e.numel() ** 0.5


def test_equal_parameters_are_rounded_by_their_own_numbers():
    params = [nn.Parameter(torch.ones(40, 30, dtype=torch.bfloat16)) for _ in range(2)]
    opt = MoFaSGD(params, lr=1e-3, rank=2)
    for p in params:
        p.grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    opt.step()
    assert not torch.equal(*params)


@pytest.mark.parametrize("tile", [1, 100, 10**6])
def test_gaussian_is_exact_in_bfloat16_and_equal_in_tiles(monkeypatch, tile):
    # A layer under autocast multiplies by the bfloat16 matrix, the step inverts the float32 one.
    expected = gaussian(37, 11, 5, CPU, torch.float32)
    monkeypatch.setattr(rng, "_TILE", tile)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for key in (5, key_tensor([7, 5], CPU)[1]):
            assert torch.equal(gaussian(37, 11, key, CPU, dtype).float(), expected)


def test_the_starts_matrices_differ_by_seed_parameter_and_side():
    shape = MatrixShape((), 60, 60)
    firsts = [FirstWindow(s, i, shape, 8, torch.float32) for s in (0, 1) for i in (0, 1)]
    made = [M[:, :24] for first in firsts for M in (first.right(CPU), first.left(CPU))]
    for i, a in enumerate(made):
        assert all(abs((a * b).mean()) < 6 / a.numel() ** 0.5 for b in made[:i])


@pytest.mark.parametrize("size", [1, 7, 100, 10**9])
def test_adamw_in_tiles_changes_no_bit(monkeypatch, size):
    results = []
    for tile in (10**9, size):
        monkeypatch.setattr(adamw, "TILE", tile)
        torch.manual_seed(1)
        p = nn.Parameter(torch.randn(10, 21).bfloat16())
        opt = MoFaSGD([{"params": [p], "algorithm": "adamw"}], weight_decay=0.1, max_grad_norm=0.1)
        for _ in range(3):
            p.grad = torch.randn(10, 21).bfloat16()
            opt.step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_rounding_repeats_with_the_seed_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    W = nn.Parameter(torch.ones(40, 30, dtype=torch.bfloat16))
    results = []
    for seed in (0, 0, 1):
        p = nn.Parameter(W.detach().clone())
        opt = MoFaSGD([p], lr=1e-3, rank=2, seed=seed)
        for i in range(3):
            p.grad = torch.full((40, 30), 1.0 + i).bfloat16()
            opt.step()
        results.append(p.detach())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(1, 50, 30), (5, 20, 30), (4, 7, 3)])
@pytest.mark.parametrize("tile", [1, 100, 700, 10**9])
def test_tiles_change_no_bit(monkeypatch, shape, tile):
    b, m, n = shape
    left, right, extra = torch.randn(b, m, 3), torch.randn(b, n, 3), torch.randn(shape)
    results = []
    for size in (10**9, tile):
        monkeypatch.setattr(apply, "TILE", size)
        torch.manual_seed(1)
        W = torch.randn(shape).bfloat16()
        rounding = Rounding.of(True, 0, 0, torch.tensor(3.0))
        apply.apply_update(W, left.clone(), right, extra, torch.full((b,), 0.5), rounding)
        results.append(W)
    # Products of a different number of rows may round differently by one float32 ulp, seldom enough to cross
    # a rounding threshold; the random words themselves must agree everywhere.
    assert (results[0] != results[1]).float().mean() <= 0.002


def test_adamw_numbers_its_elements_alike_in_every_memory_format():
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        p = nn.Parameter(torch.randn(4, 5, 6, 7).bfloat16().to(memory_format=memory_format))
        opt = MoFaSGD([{"params": [p], "algorithm": "adamw"}], weight_decay=0.1)
        for _ in range(3):
            p.grad = torch.randn(4, 5, 6, 7).bfloat16()
            opt.step()
        results.append(p.detach())
    assert torch.equal(*results)
