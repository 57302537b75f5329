"""What a plan says is what a run holds: beside an H200's peaks, beside recorded runs on the CPU, and by hand."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

import peft
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mofasgd import MoFaSGD, cli, param_groups
from mofasgd.app.tune.config import MethodConfig, PlanConfig
from mofasgd.app.tune.methods import METHODS, resolve
from mofasgd.app.tune.models import prepare
from mofasgd.app.tune.plan import chosen
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
        ("llama_step.json", ("mofasgd r8", 2, 2048, False), {"rank": 8}),
        pytest.param("llama_step_ranks.json", ("mofasgd r128", 2, 2048, False), {"rank": 128}, marks=pytest.mark.slow),
        # Here the first step is the peak.
        pytest.param("llama_step_ranks.json", ("mofasgd r128", 1, 1024, True), {"rank": 128}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_plan_is_the_peak_of_an_h200(file, row, options):
    config, peak = measured(file, *row)
    plan = estimate(config, batch=row[1], seq=row[2], checkpointing=row[3], freeze=OUTER, **options)
    assert plan.total == pytest.approx(peak, rel=0.01)


@pytest.mark.slow
def test_the_plan_of_a_model_with_adapters_is_the_peak_of_an_h200():
    config, peak = measured("llama_step.json", "lora r8", 2, 2048, False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16().requires_grad_(False)
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear")).bfloat16()
    assert estimate(model, "adamw", batch=2, seq=2048).total == pytest.approx(peak, rel=0.01)


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


def gpt2(dropout=0.0):
    sizes = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    return GPT2Config(**sizes, attn_pdrop=dropout, resid_pdrop=0.0, embd_pdrop=0.0)


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=2)).bfloat16(),
    "gpt2": lambda: GPT2LMHeadModel(gpt2()),
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
        own = {key: settings[key] for key in ("rank", "complement", "factor")}
        groups = param_groups(model, **own)
        optimizer = MoFaSGD(groups)
        if settings["attach"] != "none":
            optimizer.attach(model, settings["attach"], step_in_backward=bool(settings["complement"]))
    else:
        optimizer = METHODS[method].build(model, settings)
    ids = torch.randint(256, (BATCH, LENGTH))
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


RELEASE = {"rank": 4, "attach": "release"}


@pytest.mark.parametrize(
    ("model", "method", "given"),
    [
        ("llama", "mofasgd", {"rank": 4}),
        ("llama", "mofasgd", {"rank": 4, "attach": "none"}),
        ("llama", "mofasgd", RELEASE),
        ("llama", "adamw", {}),
        ("llama", "lora", {"rank": 4}),
        ("llama", "galore", {"rank": 4}),
        ("llama", "muon", {}),
        ("gpt2", "mofasgd", {"rank": 4, "factor": ["*wte*"]}),
        ("gpt2", "adamw", {"freeze": ["*wpe*", "*ln_*"]}),
        ("gpt2", "lora", {"rank": 4}),
        ("mixed", "mofasgd", {"rank": 4}),
        ("mixed", "mofasgd", RELEASE | {"complement": 1.0}),
        ("mixed", "galore", {"rank": 4}),
        ("mixed", "lora", {"rank": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_the_parts_of_a_plan_are_those_of_a_recorded_run(model, method, given):
    torch.manual_seed(0)
    real = MODELS[model]()
    plan = estimate(real, method, batch=BATCH, seq=LENGTH, **given)
    held = recorded(real, method, **given)
    assert plan.weights == held["weights"]
    assert plan.optimizer_state == held["optimizer state"]
    assert plan.gradients == held["gradients"]
    # A few numbers stand for the probes and keys of layers.
    assert plan.sketches == pytest.approx(held["sketches"], rel=0.01)
    assert plan.activations == pytest.approx(held["activations"], rel=0.01)


WIDTH, ROWS = 512, 64
MATRIX = 4 * WIDTH * WIDTH


def chain():
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))


def plan_of_chain(method="mofasgd", **options):
    return estimate(chain(), method, batch=ROWS // 8, seq=8, **options)


def test_gradients_follow_the_way_of_training():
    adamw, dense = plan_of_chain("adamw"), plan_of_chain(rank=4, attach="none")
    assert adamw.gradients == dense.gradients == 4 * MATRIX
    assert (adamw.sketches, dense.sketches) == (0, 0)
    sketched, released = plan_of_chain(rank=2), plan_of_chain(rank=2, attach="release")
    assert sketched.gradients == released.gradients == 0
    # First window: 12 and 25 columns. Later: 2 and 2.
    assert sketched.sketches == released.sketches == 4 * 4 * WIDTH * (12 + 25)
    # The inputs of four layers and of the square; none of the weights' gradients, or one or two at a time.
    row = 4 * ROWS * WIDTH
    assert sketched.activations == released.activations == adamw.activations == pytest.approx(5 * row, abs=16)
    assert sketched.temporaries < MATRIX < released.temporaries < 2 * MATRIX + 4 * row


def test_the_peak_is_what_is_there_together():
    plan = plan_of_chain("adamw")
    # Gradients come while activations go: at the step all of the one and none of the other.
    assert plan.total == pytest.approx(16 * MATRIX, rel=0.02)
    assert plan.activations > 4 * 4 * ROWS * WIDTH > 2 * plan.at_peak["activations"]
    assert sum(plan.at_peak.values()) == plan.total
    # From the second backward of a step on both are there.
    both = plan_of_chain("adamw", accumulate=True)
    assert both.total >= plan.total + plan.activations
    assert plan_of_chain(rank=4).total < plan.total / 2


def test_dropout_is_kept_as_on_a_gpu():
    # A byte an element; attention's, nothing at all.
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    without, by_layer = (
        estimate(nn.Sequential(layers[0], *more, layers[1]), "adamw", batch=ROWS, seq=1)
        for more in ([], [nn.Dropout(0.1)])
    )
    assert by_layer.activations - without.activations == ROWS * WIDTH
    for again in (False, True):
        without, in_attention = (estimate(gpt2(p), "adamw", batch=2, seq=256, checkpointing=again) for p in (0.0, 0.1))
        assert in_attention.activations == without.activations


def test_a_step_makes_more_than_twice_the_factors():
    side, rank = 2**16, 2**12
    model = nn.Sequential(nn.Linear(side, side, bias=False, device="meta"))
    factors = 4 * 2 * side * rank
    plan = estimate(model, rank=rank, attach="none", batch=1, seq=1)
    assert plan.temporaries == pytest.approx(2.25 * factors, rel=0.01)
    assert plan.total >= plan.weights + plan.gradients + plan.optimizer_state + 2 * factors


def test_checkpointing_and_precision():
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 6}, intermediate_size=256)
    plans = {flag: estimate(config, "adamw", batch=8, seq=64, checkpointing=flag) for flag in (False, True)}
    # Six inputs of layers, logits and the rest of the loss stay.
    assert plans[True].activations < plans[False].activations / 3
    assert plans[True].weights == plans[False].weights
    single, mixed = (estimate(config, "adamw", batch=8, seq=64, precision=p) for p in ("float32", "bf16-mixed"))
    assert single.weights == mixed.weights == pytest.approx(2 * plans[False].weights, rel=0.01)
    assert plans[False].activations < mixed.activations < single.activations
    with pytest.raises(ValueError, match="Sequential has no gradient_checkpointing_enable"):
        plan_of_chain(checkpointing=True)


def test_nothing_of_the_size_of_the_model_is_made_and_the_model_stays():
    # 2^48 numbers: more than a machine's memory by far.
    side = 2**24
    model = nn.Sequential(nn.Linear(side, side, bias=False, device="meta"))
    plan = estimate(model, "adamw", batch=2, seq=2)
    assert (plan.weights, plan.gradients, plan.optimizer_state) == (4 * side**2, 4 * side**2, 8 * side**2 + 4)
    real = MODELS["llama"]().eval()
    before = {name: (param, param.requires_grad, param.grad) for name, param in real.named_parameters()}
    for method in ("mofasgd", "lora"):
        estimate(real, method, rank=4, batch=1, seq=8, checkpointing=True)
    assert all(before[name][0] is param and param.requires_grad for name, param in real.named_parameters())
    assert not real.training
    assert not real.is_gradient_checkpointing
    assert real.config._attn_implementation == "sdpa"
    assert all(type(module) in (type(m) for m in MODELS["llama"]().modules()) for module in real.modules())


class Counting(nn.Module):
    """A forward that depends on numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mofsgd"}, r"method='mofsgd' is unknown; did you mean 'mofasgd'\?"),
        (
            {"method": "adamw", "rank": 8},
            "rank=8 has no effect for method=adamw: it is a setting of mofasgd, lora",
        ),
        ({"method": "lora", "freeze": ["*"]}, "has no effect for method=lora"),
        ({"complement": 1.0}, "complement=1 reads whole gradients: it needs attach=release"),
        ({"complement": 1.0, "attach": "release", "accumulate": True}, "takes one backward a step"),
        ({"attach": "realease"}, "attach='realease' is unknown; did you mean 'release'"),
        ({"rank": 0}, "rank=0 should be a whole number of at least 1"),
        ({"rank": 512}, "rank=512 leaves no matrix of Sequential to factor"),
        ({"batch": 0}, "batch=0 should be"),
        ({"seq": 0}, "seq=0 should be"),
        ({"precision": "bf16"}, "precision='bf16' is unknown; did you mean"),
        ({"freeze": ["nothing*"]}, r"freeze='nothing\*' matches no parameter"),
        ({"model_or_config": "gpt2"}, "a str is neither a module nor a config"),
        (
            {"model_or_config": nn.Conv2d(3, 3, 3), "method": "adamw"},
            "Conv2d begins with no embedding or linear layer: give inputs=",
        ),
        ({"model_or_config": Counting(), "rank": 4}, "Counting reads numbers of its tensors"),
        ({"inputs": torch.empty(3, 5)}, "a forward and backward of Sequential failed"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        estimate(**{"model_or_config": chain(), **options})


def test_inputs_and_a_loss_of_ones_own():
    image = torch.empty(2, 3, 16, 16, device="meta")
    seen = []
    plan = estimate(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)),
        "adamw",
        inputs=image,
        loss=lambda out: (seen.append(tuple(out.shape)), out.exp().sum())[1],
    )
    assert seen == [(2, 8, 16, 16)]
    # The image is there, and what exp has made.
    assert plan.activations >= 4 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    "total",
    [lambda b: 10 + 3 * b, lambda b: max(50, 7 * b), lambda b: max(40, 10 + 2 * b, 9 * b - 60), lambda b: 30],
)
def test_the_largest_batch_that_fits(total):
    for limit in (9, 20, 33, 49, 50, 51, 63, 333):
        asked = []
        found = largest_batch(lambda b, asked=asked: asked.append(b) or total(b), limit, most=200)
        assert found == max((b for b in range(1, 201) if total(b) <= limit), default=0)
        assert len(asked) <= 12


def test_names_and_defaults_are_those_of_finetune():
    for name, method in METHODS.items():
        own = settings_of(name)
        assert {key: method.defaults[key] for key in own} == {key: list(v) if v == () else v for key, v in own.items()}
        # None that changes memory is left out: rates and the like do not.
        assert not set(own) ^ set(method.defaults) & {"rank", "attach", "complement", "factor", "freeze"}
    with pytest.raises(ValueError, match="method='nothing' is unknown"):
        settings_of("nothing")


def plan_json(capsys, *arguments):
    code = cli.main(["plan", *map(str, arguments), "--json", "true"])
    out, err = capsys.readouterr()
    return (json.loads(out), None) if code == 0 else (None, err)


def test_the_command(tmp_path, capsys):
    # A configuration alone: there are no weights to load.
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 1}, intermediate_size=96, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    asked = ["--model", tmp_path, "--batch_size", 2, "--context", 64]
    assert set(chosen(PlanConfig())) == set(METHODS)
    found, _ = plan_json(capsys, *asked, "--rank", 4, "--freeze", '["lm_head*"]', "--methods", "lora, mofasgd")
    assert set(found["methods"]) == {"lora", "mofasgd"}
    for name, row in found["methods"].items():
        settings = {"rank": 4, "freeze": ["lm_head*"]}
        plan = estimate(
            config, name, batch=2, seq=64, **{key: settings[key] for key in settings_of(name) & settings.keys()}
        )
        assert {key: row[key] for key in plan.as_dict()} == plan.as_dict()
    limits = ["--gpu_gb", 0.6, "--reserve_gb", 0.5]
    row = plan_json(capsys, *asked, *limits, "--methods", "adamw")[0]["methods"]["adamw"]
    assert row["fits"]
    within, beyond = (estimate(config, "adamw", batch=row["largest_batch"] + i, seq=64).total for i in (0, 1))
    assert within <= 0.1 * 2**30 < beyond
    assert cli.main(["plan", *map(str, asked + limits), "--methods", "adamw8bit"]) == 0
    shown = capsys.readouterr().out
    assert "yes" in shown.split("adamw8bit")[1]
    assert "lora" not in shown
    for wrong, message in (
        (["--methods", "adamw", "--rank", 4], "rank=4 has no effect for methods=adamw"),
        (["--methods", "adamv"], "did you mean 'adamw'?"),
        (["--gpu_gb", 1, "--reserve_gb", 2], "gpu_gb=1"),
        (["--model", tmp_path / "nothing"], "there is no such folder"),
    ):
        _, error = plan_json(capsys, *asked, *wrong)
        assert message in error
