"""The optimizer's steps against the dense float64 reference, and torch's optimizer protocol."""

import copy
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from common import F64, NoReadback, gradients, run, weight
from reference import DenseMoFaSGD, polar
from torch import nn

from mofasgd import MoFaSGD, momentum, param_groups
from mofasgd.paper import AuthorsMFSGD

# With float64 factors "auto" is "svd": what most train with is asked for by name.
SOLVERS = ("svd", "gram")


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10), (5, 4)])
@pytest.mark.parametrize("complement", [0.0, 1.5])
@pytest.mark.parametrize("solver", SOLVERS)
def test_ten_steps_equal_the_dense_algorithm(shape, complement, solver):
    W = weight(*shape)
    scale = max(1, shape[0] / shape[1]) ** 0.5
    reference = DenseMoFaSGD(W.detach().numpy(), rank=3, lr=0.1, decay=0.3, c=complement, scale=scale)
    opt = MoFaSGD([W], lr=0.1, rank=3, weight_decay=0.3, complement=complement, solver=solver, **F64)
    for G in gradients(shape, 10):
        norm = reference.norm(G)
        reference.step(G)
        run(opt, [W], [G])
        assert opt.grad_norm().item() == pytest.approx(norm, rel=1e-9)
        assert np.abs(opt.momentum(W).numpy() - reference.M).max() <= 1e-9 * np.linalg.norm(reference.M)
    assert np.abs(W.detach().numpy() - reference.W).max() <= 1e-9


def test_first_step_of_a_large_matrix_is_the_polar_factor_of_the_gradient():
    rng = np.random.default_rng(0)
    G = rng.standard_normal((150, 4)) @ rng.standard_normal((4, 120))
    W = weight(150, 120, dtype=torch.float32)
    before = W.detach().clone()
    opt = MoFaSGD([W], lr=1.0, rank=4, lr_scale="none")
    run(opt, [W], [G])
    assert np.abs((before - W.detach()).numpy() - polar(G)).max() <= 1e-5
    assert np.linalg.norm(opt.momentum(W).numpy() - G) <= 1e-5 * np.linalg.norm(G)


@pytest.mark.parametrize(("transposed", "expected"), [(False, (12 / 3) ** 0.5), (True, 1.0)])
def test_spectral_scale_is_the_root_of_out_over_in(transposed, expected):
    W = weight(12, 3)
    before = W.detach().clone()
    opt = MoFaSGD([{"params": [W], "transposed": transposed}], lr=0.1, rank=2, **F64)
    run(opt, [W], gradients((12, 3), 1))
    assert torch.linalg.matrix_norm(before - W.detach(), 2).item() == pytest.approx(0.1 * expected, rel=1e-9)


@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("complement", [0.0, 2.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_match_rms_scale_makes_the_update_as_large_as_adamws(q, complement, solver):
    rng = np.random.default_rng(2)
    W = weight(20, 16)
    opt = MoFaSGD([W], lr=0.5, rank=3, lr_scale="match_rms_adamw", complement=complement, solver=solver, **F64)
    # The start, and a momentum that has been updated.
    for _ in range(2):
        G = rng.standard_normal((20, q)) @ rng.standard_normal((q, 16))
        if complement:
            G += 0.1 * rng.standard_normal((20, 16))
        before = W.detach().clone()
        run(opt, [W], [G])
        assert (before - W.detach()).square().mean().sqrt().item() == pytest.approx(0.2 * 0.5, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_factor_clips_factored_and_adamw_parameters_together(max_norm, solver):
    W, b = weight(9, 7), weight(7, seed=3)
    groups = [{"params": [W]}, {"params": [b], "algorithm": "adamw", "lr": 0.01}]
    opt = MoFaSGD(groups, lr=0.1, rank=2, max_grad_norm=max_norm, lr_scale="none", solver=solver, **F64)
    reference = DenseMoFaSGD(W.detach().numpy(), rank=2, lr=0.1)
    twin = nn.Parameter(b.detach().clone())
    adamw = torch.optim.AdamW([twin], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for G, g in zip(gradients((9, 7), 6), gradients((7,), 6, seed=4), strict=True):
        norm = np.hypot(reference.norm(G), np.linalg.norm(g))
        clip = min(1.0, max_norm / norm)
        reference.step(G, clip)
        twin.grad = torch.from_numpy(clip * g)
        adamw.step()
        run(opt, [W, b], [(G, g)])
        assert opt.grad_norm().item() == pytest.approx(norm, rel=1e-9)
        assert np.abs(opt.momentum(W).numpy() - reference.M).max() <= 1e-9 * np.linalg.norm(reference.M)
    assert np.abs(W.detach().numpy() - reference.W).max() <= 1e-9
    assert (b - twin).abs().max() <= 1e-9


def test_adamw_groups_equal_torch_adamw():
    shapes = [(30, 4), (17,), ()]
    mine, theirs = ([weight(*s, dtype=torch.float32) for s in shapes] for _ in range(2))
    opt = MoFaSGD(
        [{"params": mine, "algorithm": "adamw", "lr": 0.01, "eps": 1e-6, "weight_decay": 0.1}], adamw_betas=(0.8, 0.99)
    )
    other = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
    for step in range(20):
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            p.grad = q.grad = None if (step + i) % 5 == 0 else torch.randn(p.shape)
        opt.step()
        other.step()
    # The same float32 formula in another order: a few roundings of weights of size 1.
    assert all((p - q).abs().max() <= 1e-6 for p, q in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
def test_matrices_that_step_together_equal_single_ones(solver):
    # Two of one shape, and one of another: of equal rank, they share the small algebra.
    shapes, options = [(8, 6), (8, 6), (5, 9)], {"rank": 2, "complement": 1.0, "solver": solver, **F64}
    steps = [gradients(shape, 5, seed=s) for s, shape in enumerate(shapes)]
    together, alone = ([weight(*shape, seed=s) for s, shape in enumerate(shapes)] for _ in range(2))
    run(MoFaSGD(together, **options), together, list(zip(*steps, strict=True)))
    for p, grads in zip(alone, steps, strict=True):
        run(MoFaSGD([p], **options), [p], grads)
    assert all((p - q).abs().max() <= 1e-12 for p, q in zip(together, alone, strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
def test_hard_gradients_change_nothing_for_those_that_step_with_them(solver):
    # Of equal rank: one batch of small algebra.
    shapes = [(9, 7), (5, 8), (2, 8, 9), (2, 6, 5)]
    options = {"rank": 3, "complement": 1.0, "solver": solver, **F64}
    together, alone = ([weight(*shape) for shape in shapes] for _ in range(2))
    opt, others = MoFaSGD(together, **options), [MoFaSGD([p], **options) for p in alone]
    rng = np.random.default_rng(0)
    for hard in ("rank one", "rank one", "zero", "not finite", None):
        for i in range(len(shapes)):
            grads = [rng.standard_normal(shape) for shape in shapes]
            if hard == "rank one":
                grads[i] = grads[i][..., :1] * grads[i][..., :1, :]
            elif hard:
                grads[i][...] = 0.0 if hard == "zero" else np.nan
            run(opt, together, [tuple(grads)])
            for other, p, G in zip(others, alone, grads, strict=True):
                run(other, [p], [G])
            assert all((p - q).abs().max() <= 1e-9 for p, q in zip(together, alone, strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
def test_stack_and_flatten_layouts_equal_the_matrices_they_stand_for(solver):
    grads = gradients((4, 8, 6), 5)
    stack, matrices = weight(4, 8, 6), [nn.Parameter(w) for w in weight(4, 8, 6).detach()]
    opt = MoFaSGD([stack], rank=2, complement=1.0, lr_scale="match_rms_adamw", solver=solver, **F64)
    twin = MoFaSGD(matrices, rank=2, complement=1.0, lr_scale="match_rms_adamw", solver=solver, **F64)
    run(opt, [stack], grads)
    run(twin, matrices, [tuple(g) for g in grads])
    assert all((stack[i] - w).abs().max() <= 1e-12 for i, w in enumerate(matrices))
    assert opt.factors(stack).U.shape == (4, 8, 2)
    assert opt.momentum(stack).shape == stack.shape

    conv = nn.Parameter(weight(8, 4, 3, 2).detach().to(memory_format=torch.channels_last))
    flat = nn.Parameter(conv.detach().reshape(8, 24))
    grads = gradients((8, 4, 3, 2), 5)
    run(MoFaSGD([conv], rank=2, solver=solver, **F64), [conv], grads)
    run(MoFaSGD([flat], rank=2, solver=solver, **F64), [flat], [g.reshape(8, 24) for g in grads])
    assert (conv.reshape(8, 24) - flat).abs().max() <= 1e-12


def test_gradients_are_read_only_and_the_closure_returns_its_loss():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    opt = MoFaSGD(param_groups(model, rank=2, complement=1.0), max_grad_norm=1e-3)
    x = torch.randn(7, 6)

    def closure():
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    first = opt.step(closure)
    assert first.requires_grad
    kept = [(p.grad, p.grad.clone(), p.grad.data_ptr()) for p in model.parameters()]
    opt.step()
    assert all(
        p.grad is g and torch.equal(g, c) and g.data_ptr() == at
        for p, (g, c, at) in zip(model.parameters(), kept, strict=True)
    )
    assert opt.step(closure) < first


def test_lr_and_decay_may_be_tensors_and_schedulers_drive_each_group():
    def make(lr):
        W, b = weight(8, 6), weight(6, seed=5)
        opt = MoFaSGD(
            [{"params": [W]}, {"params": [b], "algorithm": "adamw", "lr": lr / 10}],
            lr=lr,
            rank=2,
            weight_decay=0.1,
            **F64,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
        for G, g in zip(gradients((8, 6), 4), gradients((6,), 4), strict=True):
            run(opt, [W, b], [(G, g)])
            schedule.step()
        return W, b, opt

    W, b, opt = make(0.1)
    tW, tb, topt = make(torch.tensor(0.1, dtype=torch.float64))
    assert isinstance(topt.param_groups[0]["lr"], torch.Tensor)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.02)
    assert (W - tW).abs().max() <= 1e-12
    assert (b - tb).abs().max() <= 1e-12


def test_reciprocal_update_divides_by_clipped_singular_values():
    W, G = weight(9, 8), gradients((9, 8), 1)[0]
    before = W.detach().clone()
    opt = MoFaSGD(
        [W], lr=1.0, rank=4, update="reciprocal", eta1=0.5, clip_eps=3.0, max_value=0.15, lr_scale="none", **F64
    )
    U, s, Vh = np.linalg.svd(G)
    h = np.where(s[:4] > 3.0, 0.5 * np.minimum(1 / s[:4], 0.15), 0.0)
    run(opt, [W], [G])
    assert np.abs((before - W.detach()).numpy() - (U[:, :4] * h) @ Vh[:4]).max() <= 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradscaler_scales_back_and_skips_overflows(solver):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    W, twin, b, btwin = weight(9, 7), weight(9, 7), weight(7), weight(7)
    opt = MoFaSGD(
        [{"params": [W]}, {"params": [b], "algorithm": "adamw"}], rank=2, max_grad_norm=1.0, solver=solver, **F64
    )
    plain = MoFaSGD(
        [{"params": [twin]}, {"params": [btwin], "algorithm": "adamw"}], rank=2, max_grad_norm=1.0, solver=solver, **F64
    )
    scaler.scale(torch.zeros(()))
    for i, (G, g) in enumerate(zip(gradients((9, 7), 5), gradients((7,), 5), strict=True)):
        scale = scaler.get_scale()
        W.grad, b.grad = torch.from_numpy(scale * G), torch.from_numpy(scale * g)
        if i == 2:
            b.grad[0] = float("inf")
            kept = copy.deepcopy((W.data, b.data, opt.state_dict()["state"]))
        scaler.step(opt)
        scaler.update()
        if i == 2:
            assert torch.equal(W, kept[0])
            assert torch.equal(b, kept[1])
            assert all(
                torch.equal(v, kept[2][k][n]) for k, s in opt.state_dict()["state"].items() for n, v in s.items()
            )
            assert scaler.get_scale() == scale / 2
            continue
        run(plain, [twin, btwin], [(G, g)])
        assert opt.grad_norm().item() == pytest.approx(plain.grad_norm().item(), rel=1e-9)
    assert (W - twin).abs().max() <= 1e-9
    assert (b - btwin).abs().max() <= 1e-9


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_and_pickles_go_on_as_the_original(duplicate):
    W = weight(9, 7, dtype=torch.float32)
    opt = MoFaSGD([W], rank=2, max_grad_norm=0.5, seed=7)
    run(opt, [W], gradients((9, 7), 2))
    other = duplicate(opt)
    twin = other.param_groups[0]["params"][0]
    assert twin is not W
    for o, p in ((opt, W), (other, twin)):
        run(o, [p], gradients((9, 7), 2, seed=8))
    assert torch.equal(W, twin)
    assert other.max_grad_norm == 0.5


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_plain_polar_step_is_the_direction_of_the_paper(solver):
    W = weight(9, 7)
    opt = MoFaSGD([W], lr=0.5, rank=3, lr_scale="none", solver=solver, **F64)
    for G in gradients((9, 7), 3):
        before = W.detach().clone()
        run(opt, [W], [G])
        assert (before - 0.5 * momentum.direction(*opt.factors(W)) - W).abs().max() <= 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_groups_of_equal_shapes_keep_their_own_options(solver):
    params, twins = ([weight(9, 7, seed=s) for s in range(2)] for _ in range(2))
    options = [{"beta": 0.5, "lr": 0.1}, {"beta": 0.9, "lr": 0.2}]
    opt = MoFaSGD([{"params": [p], **o} for p, o in zip(params, options, strict=True)], rank=2, solver=solver, **F64)
    run(opt, params, list(zip(gradients((9, 7), 5), gradients((9, 7), 5, seed=2), strict=True)))
    for i, (twin, o) in enumerate(zip(twins, options, strict=True)):
        run(MoFaSGD([twin], rank=2, **o, solver=solver, **F64), [twin], gradients((9, 7), 5, seed=1 + i))
        assert (params[i] - twin).abs().max() <= 1e-12


@pytest.mark.parametrize("complement", [0.0, 1.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_half_started_stack_is_measured_and_moved_as_its_matrices_are(complement, solver):
    W = weight(3, 9, 7)
    matrices = [nn.Parameter(w.clone()) for w in W.detach()]
    opt, twin = (
        MoFaSGD(p, rank=3, complement=complement, max_grad_norm=2.0, solver=solver, **F64) for p in ([W], matrices)
    )
    rng = np.random.default_rng(0)
    for idle in ([1], [1], [2], [0, 1], []):
        G = rng.standard_normal((3, 9, 7))
        G[idle] = 0
        run(opt, [W], [G])
        run(twin, matrices, [tuple(G)])
        assert opt.grad_norm().item() == pytest.approx(twin.grad_norm().item(), rel=1e-9)
        assert all((W[i] - w).abs().max() <= 1e-9 for i, w in enumerate(matrices))


def test_a_tensor_of_one_element_is_a_number_in_every_shape():
    W, b, c = weight(8, 6), weight(6), weight()
    twin = [nn.Parameter(p.detach().clone()) for p in (W, b, c)]
    for params, lr in (((W, b, c), torch.tensor([0.02], dtype=torch.float64)), (twin, 0.02)):
        groups = [{"params": list(params[:1])}, {"params": list(params[1:]), "algorithm": "adamw"}]
        grads = list(zip(*(gradients(s, 3) for s in ((8, 6), (6,), ())), strict=True))
        run(MoFaSGD(groups, lr=lr, rank=2, **F64), params, grads)
    assert all((p - q).abs().max() <= 1e-12 for p, q in zip((W, b, c), twin, strict=True))


def test_float64_weights_take_float32_factors():
    W, twin = weight(60, 50), weight(60, 50)
    run(MoFaSGD([W], rank=4, complement=1.0, weight_decay=0.1), [W], gradients((60, 50), 3))
    run(MoFaSGD([twin], rank=4, complement=1.0, weight_decay=0.1, **F64), [twin], gradients((60, 50), 3))
    assert (W - twin).abs().max() <= 1e-5


def test_gradscaler_reaches_the_raw_gradient_of_the_authors_step_and_unscaled_gradients():
    grads = gradients((9, 7), 3)
    plain = weight(9, 7)
    run(AuthorsMFSGD([plain], lr=0.01, eta2=0.5, nesterov=True), [plain], grads)
    for unscale in (False, True):
        W = weight(9, 7)
        opt, scaler = AuthorsMFSGD([W], lr=0.01, eta2=0.5, nesterov=True), torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(torch.zeros(()))
        for G in grads:
            W.grad = 256.0 * torch.from_numpy(G)
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        assert (W - plain).abs().max() <= 1e-5


def test_an_overflow_anywhere_gates_adamw_parameters_too():
    scaler = torch.amp.GradScaler("cpu")
    W, b = weight(9, 7), weight(7)
    opt = MoFaSGD([{"params": [W]}, {"params": [b], "algorithm": "adamw"}], rank=2)
    scaler.scale(torch.zeros(()))
    before = b.detach().clone()
    W.grad, b.grad = torch.full((9, 7), float("inf"), dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    scaler.step(opt)
    assert torch.equal(b, before)
    assert opt.grad_norm() == 0
    assert opt.nonfinite_steps == 0


def test_gradscaler_may_step_without_any_gradient():
    W = weight(9, 7)
    before = W.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.step(MoFaSGD([W], rank=2))
    assert torch.equal(W, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_reads_nothing_back_once_no_matrix_is_pending(dtype):
    params = [weight(*s, dtype=dtype) for s in ((60, 50), (60, 50), (3, 20, 30), (7,))]
    groups = [{"params": params[:3]}, {"params": params[3:], "algorithm": "adamw"}]
    opt = MoFaSGD(groups, lr=torch.tensor(0.01), rank=2, complement=1.0, max_grad_norm=1.0, weight_decay=0.1)

    def step(watch):
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        with NoReadback() if watch else nullcontext():
            opt.step()

    with pytest.raises(AssertionError, match="tolist"):
        step(watch=True)  # the start is read back, which shows that the mode sees it
    step(watch=False)
    step(watch=True)


@pytest.mark.parametrize("lr_scale", ["none", "spectral", "match_rms_adamw"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_transposed_weight_trains_as_its_twin(lr_scale, solver):
    W = weight(12, 5)
    twin = nn.Parameter(W.detach().mT.clone())
    options = {"lr_scale": lr_scale, "complement": 1.0, "rank": 2, "weight_decay": 0.1, "solver": solver, **F64}
    grads = gradients((12, 5), 5)
    run(MoFaSGD([W], **options), [W], grads)
    run(MoFaSGD([{"params": [twin], "transposed": True}], **options), [twin], [G.T.copy() for G in grads])
    assert (W - twin.mT).abs().max() <= 1e-12
