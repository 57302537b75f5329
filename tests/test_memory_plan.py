"""What a plan says is what a run holds: beside an H200's peaks, beside recorded runs on the CPU, and by hand."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mofasgd import MoFaSGD, cli, param_groups
from mofasgd.app.tune.config import MethodConfig
from mofasgd.app.tune.methods import METHODS, resolve
from mofasgd.app.tune.models import prepare
from mofasgd.memory import Recorder, estimate, largest_batch, settings_of

RESULTS = Path(__file__).parents[1] / "docs" / "results"
OUTER = ["*embed_tokens*", "*lm_head*"]


def measured(file, method, batch, length, checkpointing):
    """Shape of the model, and the highest peak of a row of `benchmarks/llama_step.py`, in bytes."""
    found = json.loads((RESULTS / file).read_text())
    wanted = {"method": method, "batch": batch, "sequence": length, "checkpointing": checkpointing}
    (row,) = [row for row in found["rows"] if wanted.items() <= row.items()]
    return LlamaConfig(**found["shape"]), 2**30 * max(row["peak_gib"], row["first_step_peak_gib"])


@pytest.mark.parametrize(
    ("file", "row", "options"),
    [
        ("llama_step.json", ("adamw", 2, 2048, False), {"method": "adamw"}),
        ("llama_step.json", ("adamw", 1, 1024, True), {"method": "adamw"}),
        ("llama_step.json", ("mofasgd r8", 2, 2048, False), {"rank": 8}),
        ("llama_step_ranks.json", ("mofasgd r128", 1, 1024, True), {"rank": 128}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_plan_is_the_peak_of_an_h200(file, row, options):
    config, peak = measured(file, *row)
    plan = estimate(config, batch=row[1], seq=row[2], checkpointing=row[3], freeze=OUTER, **options)
    assert plan.total == pytest.approx(peak, rel=0.02)


def test_the_plan_of_a_model_with_adapters_is_the_peak_of_an_h200():
    config, peak = measured("llama_step.json", "lora r8", 2, 2048, False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16().requires_grad_(False)
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear")).bfloat16()
    assert estimate(model, "adamw", batch=2, seq=2048).total == pytest.approx(peak, rel=0.02)


class Mixed(nn.Module):
    """Embedding, linear layers, a convolution, a stack of experts: what a transformer of one's own may have."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.convolution = nn.Conv1d(64, 64, 3, padding=1)
        self.experts = nn.Parameter(torch.randn(4, 64, 48) / 8)
        self.out, self.head = nn.Linear(48, 64), nn.Linear(64, 256)

    def forward(self, ids):
        x = torch.relu(self.convolution(self.embedding(ids).mT).mT)
        return self.head(torch.tanh(self.out((x[:, None] @ self.experts).mean(1))))


SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=2)).bfloat16(),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.0)),
    "mixed": Mixed,
}
BATCH, LENGTH = 4, 64


def recorded(model, method, **given):
    """The most bytes of each category in two real steps of what `mofasgd finetune` trains with."""
    settings = resolve(MethodConfig(method=method, **given))
    if method == "lora" and not hasattr(model, "config"):
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        model = peft.get_peft_model(model, peft.LoraConfig(r=settings["rank"], target_modules=layers))
    else:
        model = prepare(model, method, settings, "CAUSAL_LM")
    model.train()
    if hasattr(model, "config"):
        model.config.use_cache = False  # as a Trainer
    if method == "mofasgd":
        groups = param_groups(model, rank=settings["rank"], complement=settings["complement"])
        optimizer = MoFaSGD(groups)
        if settings["attach"] != "none":
            optimizer.attach(model, settings["attach"], step_in_backward=bool(settings["complement"]))
    else:
        optimizer = METHODS[method].build(model, settings)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    with Recorder(model, optimizer) as recorder:
        for _ in range(2):
            if hasattr(model, "config"):
                loss = model(input_ids=ids, labels=ids).loss
            else:
                loss = nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten())
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
    timeline = recorder.timeline()
    most = {category: max(sizes) for category, sizes in timeline.sizes.items()}
    # While the first step arranges state anew it holds some of it twice.
    return most | {"optimizer state": timeline.sizes["optimizer state"][-1]}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("mofasgd", {"rank": 4}),
        ("mofasgd", {"rank": 4, "attach": "release"}),
        ("mofasgd", {"rank": 4, "attach": "none"}),
        ("mofasgd", {"rank": 4, "attach": "release", "complement": 1.0}),
        ("adamw", {}),
        ("lora", {"rank": 4}),
        ("galore", {"rank": 4}),
        ("muon", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_the_parts_of_a_plan_are_those_of_a_recorded_run(model, method, given):
    torch.manual_seed(0)
    real = MODELS[model]()
    plan = estimate(real, method, batch=BATCH, seq=LENGTH, **given)
    held = recorded(real, method, **given)
    print({c: (held[c], getattr(plan, c.replace(" ", "_"))) for c in held}, plan.total)
    assert plan.weights == held["weights"]
    assert plan.optimizer_state == held["optimizer state"]
    assert plan.gradients == held["gradients"]
    assert plan.sketches == pytest.approx(held["sketches"], rel=0.02, abs=100)
    assert plan.activations == pytest.approx(held["activations"], rel=0.03)
