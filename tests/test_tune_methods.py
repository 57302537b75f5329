"""The table of fine-tuning methods: what each trains, and mistakes that are named."""

import dataclasses
import gc
import importlib.util
import sys
import types

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("peft")

from tune_case import SIZES, config, save_llama

from mofasgd.app.tune import methods
from mofasgd.app.tune.config import MethodConfig
from mofasgd.app.tune.finetune import Session
from mofasgd.app.tune.joint import Joint
from mofasgd.app.tune.methods import METHODS, TableFactory, resolve
from mofasgd.app.tune.models import prepare
from mofasgd.app.tune.training import begin_run
from mofasgd.groups import freeze


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sgd"}, "method='sgd' is unknown"),
        ({"method": "lorra"}, "did you mean 'lora'"),
        ({"method": "adamw", "rank": 4}, r"rank=4 does not apply to adamw.*mofasgd, lora, galore"),
        ({"method": "mofasgd", "alpha": 4.0}, "alpha=4.0 does not apply to mofasgd"),
        ({"method": "lora", "freeze": ["*"]}, "freeze=.* does not apply to lora"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"rank": 0}, "rank=0"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"complement": 1.0}, "add --attach release.* or --attach none"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        resolve(MethodConfig(**settings))


def test_every_setting_belongs_to_a_method():
    fields = {field.name for field in dataclasses.fields(MethodConfig)} - {"method"}
    assert fields == {key for method in METHODS.values() for key in method.defaults}


@pytest.mark.skipif(
    bool(importlib.util.find_spec("torchao") or importlib.util.find_spec("bitsandbytes")), reason="there"
)
def test_a_missing_package_of_eight_bit_is_named(monkeypatch):
    with pytest.raises(ValueError, match="pip install torchao"):
        resolve(MethodConfig(method="adamw8bit"))


def test_eight_bit_takes_the_package_that_is_there(monkeypatch):
    module = types.ModuleType("bitsandbytes.optim")
    module.AdamW8bit = torch.optim.AdamW
    package = types.ModuleType("bitsandbytes")
    package.__spec__ = importlib.util.spec_from_loader("bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchao" else found(name))
    settings = resolve(MethodConfig(method="adamw8bit", weight_decay=0.1))
    model = llama()
    opt = TableFactory()(model, method="adamw8bit", settings=settings)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in opt.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "galore", "muon"])
def test_every_parameter_is_stepped_at_its_rate(name):
    given = {"rank": 4} if name == "galore" else {}
    settings = resolve(MethodConfig(method=name, **given))
    model = llama()
    opt = TableFactory()(model, method=name, settings=settings)
    rates = {p: group["lr"] for group in opt.param_groups for p in group["params"]}
    assert rates.keys() == set(model.parameters())
    for parameter, p in model.named_parameters():
        matrix = "proj" in parameter
        assert rates[p] == (settings["lr"] if matrix or name == "adamw" else settings["adamw_lr"]), parameter
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    opt.step()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())


def parts(model):
    matrices = [p for n, p in model.named_parameters() if "proj" in n]
    rest = [p for n, p in model.named_parameters() if "proj" not in n]
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.01)]


def test_joint_optimizers_step_load_and_follow_schedules_as_apart():
    """The same steps as the parts alone, with a schedule, and a state_dict taken over by another in the middle."""
    one, two = llama(), llama()
    joint, apart = Joint(parts(one)), parts(two)
    schedules = [torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (step + 1)) for opt in (joint, *apart)]
    for step in range(4):
        if step == 2:
            state, rates = joint.state_dict(), [group["lr"] for group in joint.param_groups]
            joint = Joint(parts(one))
            joint.load_state_dict(state)
            assert [group["lr"] for group in joint.param_groups] == rates
            schedules[0] = torch.optim.lr_scheduler.LambdaLR(joint, lambda step: 1 / (step + 1), last_epoch=1)
        for model, optimizers in ((one, [joint]), (two, apart)):
            ids = torch.arange(step, step + 12)[None]
            model(input_ids=ids, labels=ids).loss.backward()
            for opt in optimizers:
                opt.step()
                opt.zero_grad()
        for schedule in schedules:
            schedule.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_frozen_parameters_are_named_by_patterns():
    model = llama()
    freeze(model, ["*embed_tokens*", "lm_head.*"])
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight", "lm_head.weight"]
    with pytest.raises(ValueError, match=r"freeze='nothing\*' matches no parameter"):
        freeze(model, ["nothing*"])


def test_adapters_are_of_the_rank_and_all_that_is_trained():
    model = prepare(llama(), "lora", resolve(MethodConfig(method="lora", rank=3, alpha=6.0)), "CAUSAL_LM")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Seven linear layers in each of two blocks, two factors each.
    assert len(trained) == 28
    assert all(min(p.shape) == 3 and "lora_" in name for name, p in trained.items())
    scalings = [module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")]
    assert scalings == [2.0] * 14


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Return what makes a session of `mofasgd finetune` on two layers, without dropout, whose trainer steps thrice."""
    folder = tmp_path_factory.mktemp("methods")
    model = save_llama(folder / "model", attention_dropout=0.0)

    def make(method, **options):
        given = {"rank": 4} if "rank" in METHODS[method].defaults else {}
        given |= {"method": method, "steps": 3, "batch_size": 2, "log_every": 9, **options}
        return Session(config(folder, model, {"rows": 12, "validation_rows": 1}, **given), None)

    begin_run()
    # Every training collects garbage; going through all that is imported would be most of the time here.
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "eight_bit_class", lambda: torch.optim.AdamW)
        yield make
    gc.unfreeze()


def said(session):
    """Train, and return what the model says to 12 tokens."""
    session.trainer.train()
    with torch.no_grad():
        return session.trainer.model(input_ids=torch.arange(12)[None]).logits


OTHER = {
    "lr": 0.007,
    "adamw_lr": 0.004,
    "rank": 3,
    "alpha": 9.0,
    "beta": 0.5,
    "betas": (0.5, 0.6),
    "eps": 1e-2,
    "weight_decay": 0.5,
    "factor": ["*embed_tokens.weight"],
    "freeze": ["*embed_tokens.weight"],
    "complement": 2.0,
    "lr_scale": "match_rms_adamw",
    "gap": 1,
    "scale": 0.5,
    "max_grad_norm": 1e-3,
}
# What it takes for a setting to act.
WITH = {"complement": {"attach": "none"}}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_every_method_takes_effect(session, name):
    usual = said(session(name))
    assert torch.equal(usual, said(session(name)))
    # What attach changes is the memory: below.
    for key in sorted(METHODS[name].defaults.keys() - {"attach"}):
        fixed = WITH.get(key, {})
        before = said(session(name, **fixed)) if fixed else usual
        assert not torch.equal(before, said(session(name, **fixed, **{key: OTHER[key]}))), key


@pytest.mark.parametrize("name", ["mofasgd", "adamw"])
def test_micro_batches_change_nothing(session, name):
    # Adam's division by what is small would make much of the rounding of a sum in another order.
    rates = {"lr": 0.02, "adamw_lr": 0.1} if name == "mofasgd" else {"lr": 0.1}
    whole, halves = (said(session(name, batch_size=6, micro_batch_size=size, eps=1.0, **rates)) for size in (0, 3))
    # Batches of 3 would differ by 1e-2 and more; the rounding is of sums of some hundred float32 of up to 1.
    torch.testing.assert_close(halves, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "kept", "stepped"),
    [({}, False, False), ({"attach": "none"}, True, False), ({"attach": "release", "complement": 1.0}, False, True)],
)
def test_attach_decides_what_backward_leaves(session, options, kept, stepped):
    trainer = session("mofasgd", **options).trainer
    trainer.create_optimizer()
    matrices = [p for n, p in trainer.model.named_parameters() if "proj" in n]
    before = [p.detach().clone() for p in matrices]
    trainer.model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    assert [p.grad is not None for p in matrices] == [kept] * 14
    assert [not torch.equal(p, q) for p, q in zip(matrices, before, strict=True)] == [stepped] * 14


@pytest.mark.parametrize("name", METHODS)
def test_decay_is_decoupled_and_of_all_that_has_two_dimensions(session, name):
    """One step with it differs from one without by rate * decay * weight, whatever the gradient."""
    rates = {"lr": 1e-4} | ({"adamw_lr": 3e-4} if "adamw_lr" in METHODS[name].defaults else {})
    ends = []
    for decay in (0.0, 100.0):
        trainer = session(name, steps=1, warmup=0.0, cooldown=0.0, weight_decay=decay, **rates).trainer
        begin = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        ends.append(dict(trainer.model.named_parameters()))
    for parameter, p in begin.items():
        rate = rates["lr"] if "proj" in parameter else rates.get("adamw_lr", rates["lr"])
        decays = p.ndim == 2 and ends[1][parameter].requires_grad
        lost = ends[0][parameter] - ends[1][parameter]
        # GaLore's decay comes after its step, hence of a weight that has moved by up to the rate.
        torch.testing.assert_close(lost, 100 * rate * p * decays, rtol=0, atol=200 * rate**2)


@pytest.mark.parametrize("name", ["galore", "mofasgd"])
def test_a_rank_that_leaves_nothing_is_named(name):
    settings = resolve(MethodConfig(method=name, rank=32))
    with pytest.raises(ValueError, match="rank=32 leaves no matrix of LlamaForCausalLM"):
        prepare(llama(), name, settings, "CAUSAL_LM")
    assert prepare(llama(), name, settings | {"rank": 31}, "CAUSAL_LM") is not None
