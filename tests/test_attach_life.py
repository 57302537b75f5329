"""The life of an attachment: what it refuses, how it follows changes of the model, and that it leaves no trace."""

import copy
import gc
import io
import pickle

import pytest
import torch
from attached import GPT, VOCABULARY, gpt_loss
from torch import nn

from mofasgd import MoFaSGD, param_groups


def traces(model):
    """Everything of a model that attaching might change."""
    modules = {
        name: (type(m), {k: v for k, v in vars(m).items() if not isinstance(v, dict)}, *map(list, hooks_of(m)))
        for name, m in model.named_modules()
    }
    params = {name: (p.grad, p._post_accumulate_grad_hooks, dict(vars(p))) for name, p in model.named_parameters()}
    return modules, params


def hooks_of(module):
    return [v for k, v in vars(module).items() if k.endswith("_hooks")]


def make(model=None, **options):
    model = GPT() if model is None else model
    return model, MoFaSGD(param_groups(model, rank=4, lr=0.02, **options))


def step(model, opt):
    loss = gpt_loss(model, torch.randint(0, VOCABULARY, (2, 17)))
    loss.backward()
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("mode", ["auto", "sketch", "release"])
@pytest.mark.parametrize("leave", ["detach", "with", "error", "collected"])
def test_detaching_restores_the_model_exactly(mode, leave):
    model, opt = make()
    before, keys = traces(model), list(model.state_dict())
    handle = opt.attach(model, mode)
    assert traces(model) != before
    assert list(model.state_dict()) == keys
    step(model, opt)
    if leave == "detach":
        handle.detach()
        handle.detach()
    elif leave == "collected":
        del opt, handle
        gc.collect()
    else:
        with pytest.raises(KeyError) if leave == "error" else handle, handle:
            if leave == "error":
                raise KeyError
    assert traces(model) == before
    _, other = make(model)
    gpt_loss(model, torch.randint(0, VOCABULARY, (2, 17))).backward()
    assert all(p.grad is not None for p in model.parameters())
    other.step()
    if leave != "collected":
        assert repr(handle) == "mofasgd.attach.Handle(detached)"
        opt.attach(model, mode)
        step(model, opt)


def test_a_refused_attach_changes_nothing(monkeypatch):
    model, opt = make()
    before = traces(model)
    for arguments, message in (
        ({"mode": "skitch"}, r"mode='skitch' is unknown; did you mean 'sketch'\?"),
        ({"step_in_backward": True}, "step_in_backward=True steps by the full gradient: use mode='release'"),
        ({"mode": "release", "step_in_backward": 1}, "step_in_backward=1 should be True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            opt.attach(model, **arguments)
    bigger = GPT(layers=3)
    bigger.blocks[0], bigger.blocks[1] = model.blocks
    with pytest.raises(
        ValueError, match=r"'embedding.weight' of the model is trainable but the optimizer does not own"
    ):
        opt.attach(bigger)
    with pytest.raises(ValueError, match=r"parameter 8 \(96 x 64\) of the optimizer is not in the model"):
        opt.attach(model.blocks)
    named = MoFaSGD([(name, p) for name, p in model.named_parameters() if p.ndim == 2], rank=4)
    model.norm.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameter 'embedding.weight' of the optimizer is not in the model"):
        named.attach(model.norm)
    model.requires_grad_(True)
    _, clipping = make(model)
    clipping.max_grad_norm = 1.0
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 needs the norm of all gradients"):
        clipping.attach(model, "release", step_in_backward=True)
    with opt.attach(model), monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(ValueError, match=r"call init_process_group\(\) before attach"):
            step(model, opt)
    assert traces(model) == before
    opt.attach(model)


def test_one_model_has_one_optimizer_and_one_optimizer_one_model():
    model, opt = make()
    _, other = make(model)
    with opt.attach(model):
        with pytest.raises(ValueError, match="this optimizer is attached already"):
            opt.attach(model)
        with pytest.raises(ValueError, match="'the model' is attached to an optimizer already"):
            other.attach(model)
        inner = MoFaSGD(param_groups(model.blocks[0], rank=4, lr=0.02))
        with pytest.raises(ValueError, match="'qkv' is attached to an optimizer already"):
            inner.attach(model.blocks[0])
    with opt.attach(model, "release"), pytest.raises(ValueError, match=r"'qkv.weight' is attached to an optimizer"):
        inner.attach(model.blocks[0])
    other.attach(model)


def test_a_mode_that_cannot_serve_a_parameter_is_refused_with_the_reason():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def hooked():
        layer = nn.Linear(60, 50)
        layer.weight.register_hook(lambda g: g)
        return layer

    def patched():
        layer = nn.Linear(60, 50)
        layer.forward = lambda x: x
        return layer

    for layer, reason in (
        (nn.Conv2d(30, 20, 3), "not the weight of a linear or embedding layer"),
        (Own(60, 50), "Own has a forward of its own"),
        (patched(), "Linear has a forward of its own"),
        (hooked(), "has hooks on its gradient"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(60, 50)), "not the weight of a linear or embedding layer"),
    ):
        model = nn.Sequential(layer)
        opt = MoFaSGD(param_groups(model, rank=2, lr=0.02))
        with pytest.raises(ValueError, match=f"mode='sketch' cannot serve '0.*': {reason}; use mode='auto'"):
            opt.attach(model, "sketch")
        handle = opt.attach(model, "auto")
        assert [row.mode for row in handle.rows if row.param.ndim > 1 and row.param.shape[1] > 1] == ["release"]
        assert reason in repr(handle)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_a_weight_are_still_called_with_its_gradient(register):
    layer, x = nn.Linear(60, 50, bias=False), torch.randn(7, 60)
    seen = []
    getattr(layer.weight, register)(lambda p: seen.append((p if register == "register_hook" else p.grad).clone()))
    _, opt = make(layer)
    opt.attach(layer)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    (gradient,) = seen
    assert torch.allclose(gradient, x.sum(dim=0).expand(50, 60), atol=1e-5)


@pytest.mark.parametrize("attached", [False, True])
def test_zero_grad_leaves_zeros_if_it_is_asked_to(attached):
    model, opt = make()
    if attached:
        opt.attach(model)
    before = copy.deepcopy(model.state_dict())
    gpt_loss(model, torch.randint(0, VOCABULARY, (2, 17))).backward()
    grads = {p: p.grad for p in model.parameters() if p.grad is not None}
    assert grads
    assert (len(grads) < len(list(model.parameters()))) is attached
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is grads.get(p) for p in model.parameters())
    assert not any(grad.any() for grad in grads.values())
    # What attached layers have sketched is dropped all the same.
    opt.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_table_names_every_parameter_its_shape_mode_and_reason():
    model, opt = make()
    lines = repr(opt.attach(model)).splitlines()
    assert lines[0].split() == ["parameter", "shape", "mode", "why"]
    assert [line.split()[0] for line in lines[1:]] == [name for name, _ in model.named_parameters()]
    assert "blocks.0.qkv.weight      192 x 64  sketch  Linear" in lines
    assert "blocks.0.up.bias         256       p.grad  trained by AdamW" in lines


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
@pytest.mark.parametrize("mode", ["sketch", "release"])
def test_copies_of_an_attached_model_are_plain_and_train_on_their_own(duplicate, mode):
    model, opt = make()
    before = traces(model)[0]
    opt.attach(model, mode)
    step(model, opt)
    if duplicate == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = duplicate(model)
    assert {n: (t[0], list(t[1])) for n, t in traces(twin)[0].items()} == {
        n: (t[0], list(t[1])) for n, t in before.items()
    }
    gpt_loss(twin, torch.randint(0, VOCABULARY, (2, 17))).backward()
    assert all(p.grad is not None and p._post_accumulate_grad_hooks is None for p in twin.parameters())
    assert all(window.empty for window in opt._handle._windows.values())
    twin.zero_grad()
    step(model, opt)


def test_a_copied_optimizer_is_not_attached():
    model, opt = make()
    opt.attach(model)
    pair = copy.deepcopy((model, opt))
    step(*pair)
    pair[1].attach(pair[0])
    step(*pair)


@pytest.mark.parametrize("mode", ["auto", "release"])
def test_parameters_replaced_after_attaching_are_bound_at_the_next_forward(mode):
    # As accelerate does under FSDP2: new parameters in the modules, then in the groups.
    model, opt = make()
    handle = opt.attach(model, mode)
    replaced = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = replaced[p]
    for group in opt.param_groups:
        group["params"] = [replaced[p] for p in group["params"]]
    weight = model.blocks[0].up.weight
    before = weight.detach().clone()
    gpt_loss(model, torch.randint(0, VOCABULARY, (2, 17))).backward()
    assert weight.grad is None
    opt.step()
    assert not torch.equal(weight, before)
    assert all(p._post_accumulate_grad_hooks is None for p in replaced)
    handle.detach()
    assert type(model.blocks[0].up) is nn.Linear


@pytest.mark.parametrize("mode", ["auto", "release"])
def test_freezing_and_unfreezing_after_attaching(mode):
    model, opt = make()
    handle = opt.attach(model, mode)
    frozen = model.blocks[0].up.weight.requires_grad_(False)
    for trainable in (False, True, False):
        frozen.requires_grad_(trainable)
        before = frozen.detach().clone()
        step(model, opt)
        assert torch.equal(frozen, before) is not trainable
        assert ("blocks.0.up.weight" in repr(handle)) is trainable


def test_a_parameter_that_the_optimizer_loses_sight_of_is_refused_at_the_next_forward():
    model, opt = make()
    opt.attach(model)
    gone = opt.param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match="is trainable but the optimizer does not own it"):
        gpt_loss(model, torch.randint(0, VOCABULARY, (2, 17)))
    gone.requires_grad_(False)


def test_binding_again_keeps_what_the_window_has_gathered():
    results = []
    tokens = torch.randint(0, VOCABULARY, (2, 2, 17))
    start = GPT()
    for interrupted in (False, True):
        model, opt = make(copy.deepcopy(start))
        model.extra = nn.Linear(60, 50).requires_grad_(False)
        handle = opt.attach(model)
        gpt_loss(model, tokens[0]).backward()
        if interrupted:
            model.extra.requires_grad_(True)
            for group in param_groups(model.extra, rank=4, lr=0.02):
                opt.add_param_group(group)
        gpt_loss(model, tokens[1]).backward()
        assert ("extra.weight" in repr(handle)) is interrupted
        opt.step()
        results.append(model.blocks[0].up.weight)
    assert torch.equal(*results)


def test_binding_again_does_not_forget_that_a_weight_has_moved():
    model, opt = make()
    opt.attach(model, "release", step_in_backward=True)
    step(model, opt)
    tokens = torch.randint(0, VOCABULARY, (2, 17))
    gpt_loss(model, tokens).backward()
    model.blocks[0].up.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"a second gradient of 'head.weight'"):
        gpt_loss(model, tokens).backward()


def test_an_old_handle_does_not_touch_a_new_attachment():
    model, opt = make()
    old = opt.attach(model)
    old.detach()
    opt.attach(model)
    attached = traces(model)
    old.detach()
    assert traces(model) == attached
    with pytest.raises(ValueError, match="attached already"):
        opt.attach(model)


def test_a_gradient_from_before_attaching_is_part_of_the_window():
    start, tokens = GPT(), torch.randint(0, VOCABULARY, (2, 2, 17))
    results = []
    for early in (True, False):
        model, opt = make(copy.deepcopy(start))
        if early:
            opt.attach(model)
        gpt_loss(model, tokens[0]).backward()
        if not early:
            opt.attach(model)
            assert model.head.weight.grad is None
        gpt_loss(model, tokens[1]).backward()
        opt.step()
        results.append(model.head.weight.detach())
    assert (results[0] - results[1]).abs().max() <= 1e-5


def test_a_graph_kept_over_a_step_raises_instead_of_sketching_by_new_factors():
    layer = nn.Linear(60, 50, bias=False)
    opt = MoFaSGD(layer.parameters(), rank=2)
    opt.attach(layer)
    x = torch.randn(9, 60)
    for autocast in (False, False, True):  # the first window, by the factors, by their casts
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = layer(x).square().mean()
        loss.backward(retain_graph=True)
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_layer_may_be_the_model_and_weights_may_move_to_another_dtype():
    layer = nn.Linear(60, 50)
    opt = MoFaSGD(param_groups(layer, rank=2, lr=0.02))
    handle = opt.attach(layer)
    layer.to(torch.bfloat16)
    for _ in range(3):
        layer(torch.randn(9, 60).bfloat16()).float().square().mean().backward()
        assert layer.weight.grad is None
        before = layer.weight.detach().clone()
        opt.step()
        layer.zero_grad()
        assert not torch.equal(layer.weight, before)
    handle.detach()
    assert type(layer) is nn.Linear
    assert "_mofasgd" not in str(vars(layer))


def test_attaching_a_compiled_model_attaches_the_model_in_it():
    model, opt = make()
    compiled = torch.compile(model, backend="eager")
    with opt.attach(compiled):
        assert type(compiled) is not type(model)
        step(compiled, opt)
        gpt_loss(compiled, torch.randint(0, VOCABULARY, (2, 17))).backward()
        assert model.head.weight.grad is None
    assert type(model) is GPT
    opt.zero_grad()
    gpt_loss(compiled, torch.randint(0, VOCABULARY, (2, 17))).backward()
    assert model.head.weight.grad is not None
