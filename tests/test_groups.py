"""param_groups: every trainable parameter exactly once, where the rules or the patterns put it."""

import pytest
import torch
from torch import nn

from mofasgd import MoFaSGD, param_groups


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.conv = nn.Conv2d(16, 32, 3)
        self.up = nn.ConvTranspose1d(20, 24, 5)
        self.experts = nn.Parameter(torch.randn(4, 40, 64))
        self.gate = nn.Linear(64, 4)
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 100, bias=False)
        self.frozen = nn.Linear(64, 64)
        self.frozen.requires_grad_(False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def get_output_embeddings(self):
        return self.lm_head


def assignment(groups):
    return {name: group for name, _, group, _ in groups.rows()}


@pytest.mark.parametrize("tied", [False, True])
def test_every_trainable_parameter_is_assigned_exactly_once(tied):
    model = Model(tied)
    groups = param_groups(model, rank=8)
    assigned = [p for g in groups for p in g["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, assigned)) == sorted(map(id, trainable))
    assert len(MoFaSGD(groups).param_groups) == len(groups)


def test_rules_choose_algorithm_layout_decay_and_orientation():
    found = assignment(param_groups(Model(), rank=8, lr=0.1, adamw_lr=1e-3, weight_decay=0.2, beta=0.8))
    summary = {n: (g["algorithm"], g.get("layout"), g.get("transposed"), g["weight_decay"]) for n, g in found.items()}
    linear = ("mofasgd", "matrix", False, 0.2)
    assert summary == {
        "experts": ("mofasgd", "stack", False, 0.2),
        **{f"layers.{i}.weight": linear for i in range(3)},
        **{f"layers.{i}.bias": ("adamw", None, None, 0.0) for i in range(3)},
        "conv.weight": ("mofasgd", "flatten", False, 0.2),
        "conv.bias": ("adamw", None, None, 0.0),
        "up.weight": ("mofasgd", "flatten", True, 0.2),
        "up.bias": ("adamw", None, None, 0.0),
        "gate.weight": ("adamw", None, None, 0.2),
        "gate.bias": ("adamw", None, None, 0.0),
        "norm.weight": ("adamw", None, None, 0.0),
        "norm.bias": ("adamw", None, None, 0.0),
        "embedding.weight": ("adamw", None, None, 0.2),
        "lm_head.weight": ("adamw", None, None, 0.2),
    }
    assert (found["layers.0.weight"]["lr"], found["layers.0.weight"]["rank"]) == (0.1, 8)
    assert found["layers.0.weight"]["beta"] == 0.8
    assert found["norm.weight"]["lr"] == 1e-3
    assert "beta" not in found["norm.weight"]


def test_patterns_force_either_algorithm():
    groups = param_groups(Model(), rank=8, factor=["emb*", "gate.weight"], adamw=["layers.1.*"], head=None)
    found = assignment(groups)
    assert found["embedding.weight"]["algorithm"] == "mofasgd"
    assert found["embedding.weight"]["transposed"] is True
    assert found["gate.weight"]["algorithm"] == "mofasgd"
    assert found["layers.1.weight"]["algorithm"] == "adamw"
    assert found["layers.0.weight"]["algorithm"] == "mofasgd"


@pytest.mark.parametrize("name", ["embedding.weight", "lm_head.weight"])
def test_a_tied_weight_answers_to_all_its_names(name):
    groups = param_groups(Model(tied=True), rank=8, factor=[name])
    assert assignment(groups)["embedding.weight"]["algorithm"] == "mofasgd"


def test_head_by_module_or_by_name():
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "out": nn.Linear(64, 80)})
    for head in ("out", model["out"]):
        assert assignment(param_groups(model, rank=8, head=head))["out.weight"]["algorithm"] == "adamw"
    assert assignment(param_groups(model, rank=8))["out.weight"]["algorithm"] == "mofasgd"


def test_a_conv1d_of_transformers_keeps_inputs_in_rows():
    # transformers is not installed in CI; the class is recognized by its name and module.
    Conv1D = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})
    model = Conv1D()
    model.weight = nn.Parameter(torch.randn(64, 192))
    assert assignment(param_groups(model, rank=8))["weight"]["transposed"] is True


def test_the_table_names_every_parameter_once_and_counts_the_state():
    model = Model()
    groups = param_groups(model, rank=8, adamw=["conv.weight"])
    text = str(groups)
    assert "layers.*.weight" in text
    assert "adamw='conv.weight'" in text
    assert all(word in text for word in ("embedding", "head", "1-D", "smaller side <= rank 8"))
    opt = MoFaSGD(groups)
    opt.materialize()
    numbers = sum(v.numel() for s in opt.state.values() for k, v in s.items() if k not in ("step", "initialized"))
    assert f"state {numbers:,} numbers" in text
    groups.append({"params": [nn.Parameter(torch.zeros(3))], "algorithm": "adamw"})
    assert "added by hand" in str(groups)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": ["layer.*"]}, "factor='layer.*' matches no trainable parameter"),
        ({"adamw": ["frozen.weight"]}, "adamw='frozen.weight' matches no"),
        ({"factor": ["layers.*"], "adamw": ["layers.0.weight"]}, "layers.0.weight"),
        ({"factor": ["norm.weight"]}, "matches 'norm.weight': .* no matrix to factorize"),
        ({"factor": "conv.weight"}, "factor='conv.weight' should be a list"),
        ({"bta": 0.9}, "did you mean 'beta'"),
        ({"layout": "stack"}, "param_groups has no key 'layout'"),
        ({"head": "lm_hed"}, "did you mean 'lm_head'"),
        ({"rank": "8"}, "rank='8' should be a whole number"),
        ({"lr": -1}, "lr=-1"),
        ({"factor": None}, "factor=None should be a list"),
        ({"head": nn.Linear(3, 3)}, "is no module of this model"),
        ({"head": ""}, "is no module of this model"),
    ],
)
def test_mistakes_raise_with_the_name(options, message):
    with pytest.raises(ValueError, match=message):
        param_groups(Model(), **{"rank": 8, **options})


def test_a_model_without_factored_parameters_is_warned_of_and_a_lazy_one_refused():
    with pytest.warns(UserWarning, match="nothing of this model is factored at rank=4000"):
        groups = param_groups(Model(), rank=4000)
    assert {g["algorithm"] for g in groups} == {"adamw"}
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        param_groups(nn.Sequential(nn.LazyLinear(5)), rank=2)
