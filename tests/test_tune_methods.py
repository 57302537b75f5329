"""The table of fine-tuning methods: what each trains, and mistakes that are named."""

import dataclasses
import importlib.util
import sys
import types

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("peft")

from tune_case import SIZES

from mofasgd.app.tune.config import MethodConfig
from mofasgd.app.tune.joint import Joint
from mofasgd.app.tune.methods import METHODS, TableFactory, resolve
from mofasgd.app.tune.models import prepare
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


@pytest.mark.parametrize("name", ["galore", "mofasgd"])
def test_a_rank_that_leaves_nothing_is_named(name):
    settings = resolve(MethodConfig(method=name, rank=32))
    with pytest.raises(ValueError, match="rank=32 leaves no matrix of LlamaForCausalLM"):
        prepare(llama(), name, settings, "CAUSAL_LM")
    assert prepare(llama(), name, settings | {"rank": 31}, "CAUSAL_LM") is not None
