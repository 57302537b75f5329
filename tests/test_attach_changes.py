"""What happens to an attached model between a forward and its step: hooks, freezing, the end of a window, tracing."""

import copy
import warnings

import pytest
import torch
from torch import nn

from mofasgd import MoFaSGD


def make(mode):
    """Return a model and its optimizer in float64, attached unless `mode` is None; each call makes the same."""
    torch.manual_seed(0)
    # Large enough to be sketched in the first window too.
    model = nn.Sequential(nn.Linear(60, 70, bias=False), nn.Tanh(), nn.Linear(70, 60, bias=False)).double()
    opt = MoFaSGD(list(model.parameters()), rank=2, lr=0.05, state_dtype=torch.float64)
    if mode is not None:
        opt.attach(model, mode)
    return model, opt


def loss(model, data):
    return model(torch.randn(9, 60, generator=data, dtype=torch.float64)).square().mean()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def modes(opt):
    return [row.mode for row in opt.handle.rows]


def mask(gradient):
    return gradient * (torch.arange(len(gradient)) % 2)[:, None]


def mask_accumulated(param):
    param.grad = mask(param.grad)


@pytest.mark.parametrize(("mode", "kind"), [("auto", "gradient"), ("auto", "accumulated"), ("release", "accumulated")])
def test_hooks_registered_on_a_weight_after_attaching_change_its_gradient_as_in_dense_training(mode, kind):
    # Between two micro-batches: what came before is in the window already, hence not in the hook's accumulated p.grad.
    first = {"gradient": 1, "accumulated": 0}[kind]
    results = []
    for attached in (None, mode):
        model, opt = make(attached)
        data, hook, seen = torch.Generator().manual_seed(1), None, []
        for step in range(6):
            for micro in range(2):
                if (step, micro) == (2, first):
                    weight = model[0].weight
                    hook = (
                        weight.register_hook(mask)
                        if kind == "gradient"
                        else weight.register_post_accumulate_grad_hook(mask_accumulated)
                    )
                if (step, micro) == (4, first):
                    hook.remove()
                loss(model, data).backward()
                seen += [modes(opt)[0]] if attached else []
            opt.step()
            opt.zero_grad()
        results.append(weights(model))
        if mode == attached == "auto":
            assert seen == ["sketch"] * (4 + first) + ["release"] * 4 + ["sketch"] * (4 - first)
    assert (results[0] - results[1]).abs().max() <= 1e-12


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("change", ["hooked", "unhooked", "frozen"])
def test_a_graph_made_before_a_weight_was_hooked_or_frozen_counts_in_its_window(change, steps):
    results = []
    for mode in (None, "auto"):
        model, opt = make(mode)
        data, weight = torch.Generator().manual_seed(1), model[0].weight
        for _ in range(steps):
            loss(model, data).backward()
            opt.step()
            opt.zero_grad()
        hook = weight.register_hook(lambda G: None) if change == "unhooked" else None
        early = loss(model, data)
        if change == "hooked":
            weight.register_hook(lambda G: None)
        elif change == "unhooked":
            hook.remove()
        else:
            weight.requires_grad_(False)
        late = loss(model, data)
        weight.requires_grad_(True)
        (early + late).backward()
        opt.step()
        results.append(weights(model))
    assert (results[0] - results[1]).abs().max() <= 1e-12


@pytest.mark.parametrize("mode", [None, "sketch"])
def test_what_came_before_a_weight_was_frozen_is_stepped_by_once(mode):
    model, opt = make(mode)
    data, weight = torch.Generator().manual_seed(1), model[0].weight
    for step in range(5):
        before = weight.detach().clone()
        loss(model, data).backward()
        if step == 2:
            weight.requires_grad_(False)
            # The first forward since; steps of the same buckets follow.
            loss(model, data).backward()
        opt.step()
        opt.zero_grad()
        assert torch.equal(weight, before) is (step > 2)


def test_a_layer_that_ran_before_its_weight_was_frozen_is_not_said_to_have_run_in_vain():
    model, opt = make("auto")
    data = torch.Generator().manual_seed(1)
    loss(model, data)
    model[0].weight.requires_grad_(False)
    loss(model, data).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


@pytest.mark.filterwarnings("ignore:the layer of")
@pytest.mark.parametrize(
    ("end", "steps", "compiled"),
    [(end, steps, False) for end in ("detach", "load", "deleted", "released") for steps in (0, 2)]
    + [("detach", 2, True)],
)
def test_backward_through_a_window_that_was_given_up_raises(end, steps, compiled):
    torch.compiler.reset()
    model, opt = make("auto")
    call = torch.compile(model, backend="aot_eager") if compiled else model
    data = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss(call, data).backward()
        opt.step()
    value = loss(call, data)
    if end == "detach":
        opt.handle.detach()
    elif end == "load":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif end == "released":
        # Nothing has come, so that the step leaves alone what sketches.
        for weight in model.parameters():
            weight.register_hook(lambda G: None)
        loss(model, data)
        opt.step()
    else:
        del opt
    with pytest.raises(RuntimeError, match="modified by an inplace" if compiled else "run the forward again"):
        value.backward()
    loss(call, data).backward()
    assert (model[0].weight.grad is None) is (end in ("load", "released"))


def by_grad(value, params):
    for p, G in zip(params, torch.autograd.grad(value, params, allow_unused=True), strict=True):
        p.grad = G


def by_inputs(value, params):
    value.backward(inputs=params)


@pytest.mark.parametrize("take", [by_grad, by_inputs])
def test_gradients_taken_otherwise_than_by_backward_are_missed_with_a_warning_that_says_what_to_do(take):
    results = {}
    for mode in (None, "sketch", "release"):
        model, opt = make(mode)
        data = torch.Generator().manual_seed(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            take(loss(model, data), list(model.parameters()))
            opt.step()
        results[mode] = weights(model)
        advice = [str(w.message) for w in caught if "torch.autograd.grad or backward(inputs=...)" in str(w.message)]
        assert len(advice) == (2 if mode == "sketch" else 0)
        assert all("use attach(model, mode='release')" in text for text in advice)
    assert (results["release"] - results[None]).abs().max() <= 1e-12


@pytest.mark.parametrize("steps", [0, 2])
def test_an_attached_model_is_traced_with_gradients_as_it_is_and_goes_on_being_sketched(steps):
    model, opt = make("sketch")
    data = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss(model, data).backward()
        opt.step()
        opt.zero_grad()
    x = torch.randn(9, 60, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    assert torch.equal(torch.jit.trace(model, x)(x), expected)
    assert all(isinstance(model[i], nn.Linear) and type(model[i]) is not nn.Linear for i in (0, 2))
    assert not opt.handle.nbytes
    model(x).sum().backward()
    assert opt.handle.nbytes
