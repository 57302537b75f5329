"""Attached training against dense training: whole models, first windows, memory, options, resuming, compiling."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from attached import GPT, VOCABULARY, distance, gpt_loss, train
from common import NoReadback
from torch import nn

from mofasgd import MoFaSGD, param_groups
from mofasgd.paper import AuthorsMFSGD

ALL = ("embedding*", "head*")
MODES = ["release", "sketch"]


@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twenty_steps_of_four_micro_batches_equal_dense_training(dtype, max_grad_norm):
    start = GPT().to(dtype)
    options = {"factor": ALL, "max_grad_norm": max_grad_norm, "state_dtype": dtype}
    dense, opt = train(start, None, **options)
    for mode in MODES:
        attached, other = train(start, mode, **options)
        # The products are summed in another order. Each step maps rounding of the sketches (1e-7 of them) to the
        # factors through the gaps of their spectrum, which amplify it; 6e-6 was found.
        assert distance(attached, dense, start) <= (1e-4 if dtype is torch.float32 else 1e-9)
        assert other.grad_norm().item() == pytest.approx(opt.grad_norm().item(), rel=1e-5)
        assert other.nonfinite_steps == 0
    if max_grad_norm is not None:
        assert opt.grad_norm() > max_grad_norm


@pytest.mark.parametrize("rank", [4, 16])
def test_autocast_sketches_stay_as_near_to_float32_as_dense_autocast_does(rank):
    start = GPT()
    found = {mode: [] for mode in (None, *MODES)}
    for seed in range(3):
        exact, _ = train(start, None, factor=ALL, rank=rank, seed=seed)
        for mode, distances in found.items():
            model, _ = train(start, mode, factor=ALL, rank=rank, seed=seed, autocast=True)
            distances.append(distance(model, exact, start))
    for mode in MODES:
        assert max(found[mode]) <= 1.5 * max(found[None]), found


def test_modes_may_change_between_any_two_steps_and_runs_resume_from_a_state_dict():
    start = GPT()
    dense, _ = train(start, None, steps=6)

    model, data = copy.deepcopy(start), torch.Generator().manual_seed(0)
    opt = MoFaSGD(param_groups(model, rank=4, lr=0.02))
    for mode in (None, "sketch", "release", "resume", "auto", None):
        if mode == "resume":
            saved = copy.deepcopy(opt.state_dict())
            assert not any(key.startswith("_mofasgd") for key in model.state_dict())
            opt = MoFaSGD(param_groups(model, rank=4, lr=0.02))
            handle = opt.attach(model)
            opt.load_state_dict(saved)
        elif mode is not None:
            handle = opt.attach(model, mode)
        for _ in range(4):
            (gpt_loss(model, torch.randint(0, VOCABULARY, (2, 17), generator=data)) / 4).backward()
        opt.step()
        opt.zero_grad()
        if mode is not None:
            handle.detach()
    assert distance(model, dense, start) <= 1e-4


@pytest.mark.parametrize("seed", range(10))
def test_any_order_of_calls_trains_as_dense_training_does(seed):
    start = GPT(layers=1).double()
    pairs = []
    for _ in range(2):
        model = copy.deepcopy(start)
        options = {"max_grad_norm": 0.5, "state_dtype": torch.float64}
        pairs.append([model, MoFaSGD(param_groups(model, rank=4, lr=0.02, factor=ALL), **options), None])
    random = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, n, (), generator=random).item()  # noqa: E731
    calls = ["evaluate", "model.zero_grad", "zero_grad", "freeze", "attach", "detach", "reload"]
    calls += 4 * ["backward"] + 2 * ["step"]
    for _ in range(80):
        call, which = calls[draw(len(calls))], draw(3)
        tokens = torch.randint(0, VOCABULARY, (2, 9), generator=random)
        attached = pairs[1][2] is not None
        for i, pair in enumerate(pairs):
            model, opt, handle = pair
            if call == "backward":
                gpt_loss(model, tokens).backward()
            elif call == "step":
                opt.step()
                opt.zero_grad()
            elif call == "evaluate":
                with torch.no_grad():
                    gpt_loss(model, tokens)
            elif call == "model.zero_grad":
                model.zero_grad()
            elif call == "freeze":
                model.blocks[0].up.weight.requires_grad_(which == 0)
            elif call in ("zero_grad", "reload") or attached:
                # Loading and detaching forget the window.
                opt.zero_grad()
            if call == "reload":
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            if i and call in ("attach", "detach") and attached:
                handle.detach()
                pair[2] = None
            if i and call == "attach":
                pair[2] = opt.attach(model, ("auto", "sketch", "release")[which])
    assert distance(pairs[1][0], pairs[0][0], start) <= 1e-9


@pytest.mark.parametrize("when", [0, 2])
def test_loading_a_state_forgets_the_window_and_sketches_by_the_loaded_factors(when):
    def loop(model, opt, steps, seed):
        data = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            gpt_loss(model, torch.randint(0, VOCABULARY, (2, 17), generator=data)).backward()
            opt.step()
            opt.zero_grad()

    model = GPT()
    opt = MoFaSGD(param_groups(model, rank=4, lr=0.02))
    opt.attach(model)
    loop(model, opt, when, seed=1)
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    loop(model, opt, 2, seed=2)
    expected = copy.deepcopy(model)
    gpt_loss(model, torch.randint(0, VOCABULARY, (2, 17))).backward()
    opt.load_state_dict(saved)
    model.load_state_dict(weights)
    model.zero_grad()
    loop(model, opt, 2, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


def test_options_of_groups_may_change_between_windows():
    start = GPT()
    results = []
    for mode in (None, "sketch"):
        model, data = copy.deepcopy(start), torch.Generator().manual_seed(0)
        held = model.blocks[1].requires_grad_(False)
        opt = MoFaSGD(param_groups(model, rank=4, lr=0.02))
        if mode is not None:
            opt.attach(model, mode)
        for step in range(5):
            if step == 2:
                held.requires_grad_(True)
                for group in param_groups(held, rank=4, lr=0.02):
                    opt.add_param_group(group)
            for group in opt.param_groups:
                group["lr"] *= 0.8
                if group["algorithm"] == "mofasgd":
                    group["beta"] = 0.9 - 0.1 * step
            opt.max_grad_norm = 1.0 + step
            gpt_loss(model, torch.randint(0, VOCABULARY, (2, 17), generator=data)).backward()
            assert mode is None or held.up.weight.grad is None
            opt.step()
            opt.zero_grad()
        results.append(model)
    assert distance(*results[::-1], start) <= 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_sketches_are_forgotten_by_either_zero_grad_and_by_step_and_outlive_nothing_else(mode):
    start = GPT()
    tokens = torch.randint(0, VOCABULARY, (3, 2, 17))
    results = []
    for clear in ("none", "model", "optimizer", "after the forward"):
        model = copy.deepcopy(start)
        opt = MoFaSGD(param_groups(model, rank=4, lr=0.02), max_grad_norm=0.5)
        opt.attach(model, mode)
        for step in range(3):
            if clear != "none":
                gpt_loss(model, torch.randint(0, VOCABULARY, (2, 17))).backward()
            if clear == "after the forward":
                loss = gpt_loss(model, tokens[step])
                opt.zero_grad()
            else:
                (opt if clear == "optimizer" else model).zero_grad()
                loss = gpt_loss(model, tokens[step])
            loss.backward()
            opt.step()
            # AdamW's gradients are p.grad, which a step leaves.
            assert all(window.empty for window in opt._handle._windows.values())
        results.append(model)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0].parameters(), other.parameters(), strict=True))


def test_a_gradient_set_by_hand_counts_and_stays():
    # As torch.distributed.checkpoint does: zeros, a step with lr 0.
    W = nn.Linear(60, 50, bias=False)
    twin = copy.deepcopy(W)
    opts = [MoFaSGD(m.parameters(), rank=2) for m in (W, twin)]
    opts[0].attach(W)
    for scale in (0.0, 1.0, 1.0):
        G = scale * torch.randn(50, 60)
        W.weight.grad, twin.weight.grad = G, G.clone()
        for opt in opts:
            opt.step()
        assert W.weight.grad is G
    assert (W.weight - twin.weight).abs().max() <= 1e-6


@pytest.mark.parametrize("arguments", [("auto",), ("release",), ("release", True)])
def test_training_reads_nothing_back_once_no_matrix_is_pending(arguments):
    model = GPT()
    clip = None if arguments[1:] else 1.0
    opt = MoFaSGD(param_groups(model, rank=4, lr=torch.tensor(0.02), factor=ALL), max_grad_norm=clip)
    opt.attach(model, arguments[0], step_in_backward=bool(arguments[1:]))
    for watch in (False, False, False, True):
        with NoReadback() if watch else nullcontext():
            gpt_loss(model, torch.randint(0, VOCABULARY, (2, 17))).backward()
            opt.step()
            opt.zero_grad()


def test_a_layer_that_ran_in_vain_is_warned_of_once_by_name():
    model = GPT()
    opt = MoFaSGD(param_groups(model, rank=4, lr=0.02))
    opt.attach(model)
    tokens = torch.randint(0, VOCABULARY, (2, 17))
    for attempt in range(2):
        for _ in range(2):
            gpt_loss(model, tokens).backward()
            opt.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gpt_loss(model, tokens)
            opt.step()
        named = {str(w.message).split("'")[1] for w in caught}
        factored = {n for n, p in model.named_parameters() if p.ndim == 2 and n != "embedding.weight"}
        assert named == (set() if attempt else factored)


@pytest.mark.parametrize("complement", [0.0, 1.0])
def test_steps_in_backward_equal_dense_steps_and_hold_one_gradient(complement):
    start = GPT()
    options = {"complement": complement}
    models = [copy.deepcopy(start) for _ in range(2)]
    opts = [MoFaSGD(param_groups(m, rank=4, lr=0.02, factor=ALL), **options) for m in models]
    opts[0].attach(models[0], "release", step_in_backward=True)
    data = torch.Generator().manual_seed(0)
    for _ in range(10):
        tokens = torch.randint(0, VOCABULARY, (2, 17), generator=data)
        for model, opt in zip(models, opts, strict=True):
            before = model.head.weight.detach().clone()
            gpt_loss(model, tokens).backward()
            assert torch.equal(model.head.weight, before) is (opt is opts[1])
            assert (model.head.weight.grad is None) is (opt is opts[0])
            opt.step()
            opt.zero_grad()
        assert opts[0].grad_norm().item() == pytest.approx(opts[1].grad_norm().item(), rel=1e-5)
    assert distance(*models, start) <= 1e-5


def test_a_second_backward_raises_when_the_weights_have_moved():
    model = GPT()
    opt = MoFaSGD(param_groups(model, rank=4, lr=0.02))
    handle = opt.attach(model, "release", step_in_backward=True)
    tokens = torch.randint(0, VOCABULARY, (2, 17))
    for _ in range(2):
        gpt_loss(model, tokens).backward()
        opt.step()
        opt.zero_grad()
    gpt_loss(model, tokens).backward()
    opt.zero_grad()  # does not take the steps back
    with pytest.raises(RuntimeError, match=r"a second gradient of 'head.weight'.*Use one backward per step"):
        gpt_loss(model, tokens).backward()
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 needs the norm of all gradients"):
        opt.max_grad_norm = 1.0
    handle.detach()
    opt.max_grad_norm = 1.0


def test_what_reads_the_full_gradient_is_refused_with_the_reason():
    model = nn.Sequential(nn.Linear(60, 50, bias=False))
    opt = MoFaSGD(model.parameters(), rank=2, complement=1.0)
    for mode in ("auto", "sketch", "release"):
        with pytest.raises(ValueError, match=r"complement=1.0 needs the full gradient.*step_in_backward=True"):
            opt.attach(model, mode)
    for key, value in (("eta2", 0.5), ("nesterov", True)):
        authors = AuthorsMFSGD(model.parameters(), **{"eta2": 0.0, key: value})
        with pytest.raises(ValueError, match=f"{key}={value} needs the full gradient"):
            authors.attach(model)
    assert type(model) is nn.Sequential

    opt.param_groups[0]["complement"] = 0.0
    opt.attach(model)
    opt.param_groups[0]["complement"] = 2.0
    model(torch.randn(9, 60)).square().mean().backward()
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"complement=2.0 needs the full gradient"):
        opt.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("stepping", [False, True])
def test_the_authors_step_attached_is_their_dense_step(stepping):
    start = nn.Sequential(nn.Linear(60, 50, bias=False), nn.Linear(50, 40, bias=False))
    models = [copy.deepcopy(start) for _ in range(2)]
    options = {"eta2": 0.5, "nesterov": True} if stepping else {"eta2": 0.0}
    opts = [AuthorsMFSGD(m.parameters(), **options) for m in models]
    opts[0].attach(models[0], *(["release"] if stepping else []), step_in_backward=stepping)
    for _ in range(4):
        x = torch.randn(9, 60)
        for model, opt in zip(models, opts, strict=True):
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
    assert distance(*models, start) <= 1e-4


def test_gradscaler_is_refused_while_attached():
    model = nn.Sequential(nn.Linear(60, 50))
    opt = MoFaSGD(param_groups(model, rank=2, lr=0.02))
    for mode in MODES:
        with opt.attach(model, mode):
            scaler = torch.amp.GradScaler("cpu")
            before = model[0].weight.detach().clone()
            scaler.scale(model(torch.randn(9, 60)).square().mean()).backward()
            with pytest.raises(ValueError, match=r"GradScaler cannot unscale sketches.*use bfloat16"):
                scaler.step(opt)
            assert torch.equal(model[0].weight, before)
            opt.step()  # without the scaler, nothing of which is left
            assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize(("backend", "layers"), [("eager", 9), ("aot_eager", 1), ("aot_eager", None)])
def test_compiled_models_have_no_graph_break_and_train_as_uncompiled_ones(backend, layers):
    # `layers` compiled one by one: fullgraph makes a break, and a graph for each of more than 8, an error.
    start = GPT(layers=layers or 1)
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = copy.deepcopy(start)
        opt = MoFaSGD(param_groups(model, rank=4, lr=0.02, factor=ALL))
        opt.attach(model)
        call = model
        if compiled and layers is None:
            call = torch.compile(model, backend=backend, fullgraph=True)
        elif compiled:
            for block in model.blocks:
                block.compile(backend=backend, fullgraph=True)
        data = torch.Generator().manual_seed(0)
        for _ in range(4):
            for _ in range(2):
                tokens = torch.randint(0, VOCABULARY, (2, 17), generator=data)
                gpt_loss(call, tokens).backward()
            assert model.head.weight.grad is None
            opt.step()
            opt.zero_grad()
        results.append(model)
    assert distance(*results, start) <= 1e-4
