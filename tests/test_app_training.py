"""Model, training step, schedule and the table of optimizers."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from app_common import metrics, run_quietly, tiny

from mofasgd.app.authors import ROWS
from mofasgd.app.baselines import METHODS, table
from mofasgd.app.config import OptimizerConfig
from mofasgd.app.model import GPT, rotate, rotation, token_loss
from mofasgd.app.row_norm import RowNormSGD
from mofasgd.app.schedule import lr_multiplier
from mofasgd.app.trainer import Trainer


def model():
    torch.manual_seed(0)
    net = GPT(50, 12, layers=2, width=16, heads=2)
    for param in net.parameters():  # away from the zero start
        torch.nn.init.normal_(param, std=0.3)
    return net


def rms(x):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + np.finfo(np.float32).eps)


def reference_logits(net, tokens, heads):
    """The forward pass of one sequence, written anew in numpy with a complex rotation."""
    weights = {name: param.detach().double().numpy() for name, param in net.named_parameters()}
    x = rms(weights["embedding.weight"][tokens])
    time, width = x.shape
    half = width // heads // 2
    turn = np.exp(1j * np.arange(time)[:, None] * 10000.0 ** (-np.arange(half) / half))
    for i in range(len(net.blocks)):
        inner = {name: weights[f"blocks.{i}.{name}.weight"] for name in ("up", "down")}
        q, k, v, out = (weights[f"blocks.{i}.attention.{name}.weight"] for name in ("query", "key", "value", "out"))
        h, mixed = rms(x), np.zeros((time, width))
        for head in range(heads):
            part = slice(head * 2 * half, (head + 1) * 2 * half)
            turned = []
            for weight in (q, k):
                y = rms(h @ weight[part].T)
                # Scores are real parts of products with the conjugate.
                turned.append((y[:, :half] + 1j * y[:, half:]) * turn)
            scores = (turned[0] @ turned[1].conj().T).real / np.sqrt(2 * half)
            scores[np.triu_indices(time, 1)] = -np.inf
            chances = np.exp(scores - scores.max(axis=1, keepdims=True))
            mixed[:, part] = chances / chances.sum(axis=1, keepdims=True) @ (h @ v[part].T)
        x = x + mixed @ out.T
        x = x + np.maximum(rms(x) @ inner["up"].T, 0) ** 2 @ inner["down"].T
    return rms(x) @ weights["head.weight"].T


def test_the_model_is_what_its_description_says():
    net, tokens = model(), torch.randint(50, (1, 12))
    wanted = torch.from_numpy(reference_logits(net, tokens[0].numpy(), heads=2)).float()
    torch.testing.assert_close(net(tokens)[0], wanted, rtol=1e-4, atol=1e-4)  # float32
    fresh = GPT(50, 12, layers=2, width=16, heads=2)
    zero = [name for name, param in fresh.named_parameters() if not param.any()]
    assert zero == [f"blocks.{i}.{last}.weight" for i in (0, 1) for last in ("attention.out", "down")] + ["head.weight"]


def test_row_normalized_sgd_is_its_formula():
    W, G = torch.randn(6, 4), torch.randn(6, 4)
    param = torch.nn.Parameter(W.clone())
    param.grad = G
    RowNormSGD([param], lr=0.1, weight_decay=0.5).step()
    E = G / (G**2).sum(dim=1, keepdim=True).sqrt() / 6**0.5
    # sqrt(min(m, n)) and the spectral scale sqrt(m / n)
    torch.testing.assert_close(param.detach(), 0.95 * W - 0.1 * 4**0.5 * (6 / 4) ** 0.5 * E)


def test_muon_is_the_strong_one(tmp_path):
    muon, _ = Trainer(tiny(tmp_path, optimizer={"name": "muon"})).optimizers
    (group,) = muon.param_groups
    assert (group["nesterov"], group["momentum"], group["adjust_lr_fn"]) == (True, 0.95, None)


def test_the_model_is_causal():
    net, tokens = model(), torch.randint(50, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 50
    before, after = net(tokens)[0], net(changed)[0]
    assert torch.equal(before[:7], after[:7])
    assert (before[7:] != after[7:]).any(dim=-1).all()


def test_rotation_makes_scores_relative():
    q, k = torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    cos, sin = rotation(12, 8).double()
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).T  # (query position, key position)
    for distance in (0, 3, -2):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-6)  # float32 angles
    assert abs(scores[0, 3] - scores[3, 0]) > 1e-3


def test_the_loss_is_the_sum_over_real_tokens():
    net = model()
    windows = torch.randint(50, (3, 9))
    windows[2, 5:] = -1
    loss, count = token_loss(net, windows)
    wanted = sum(F.cross_entropy(net(row[None, :-1])[0], row[1:], reduction="sum") for row in windows[:2])
    wanted += F.cross_entropy(net(windows[2:, :4])[0], windows[2, 1:5], reduction="sum")
    assert count == 20
    torch.testing.assert_close(loss, wanted)


def test_training_starts_at_the_uniform_distribution(tmp_path):
    run_quietly(tiny(tmp_path, steps=1, log_every=1))
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(256), abs=1e-5)


def weights_after(config, steps=3):
    trainer = Trainer(config)
    for _ in range(steps):
        trainer.train_step()
    return torch.cat([param.detach().flatten() for param in trainer.model.parameters()])


def test_micro_batches_change_nothing(tmp_path):
    # SGD keeps the rounding of a sum in another order small; sign-like steps would not.
    optimizer = {"name": "sgd", "lr": 0.1, "max_grad_norm": 0.0}
    whole, quarters = (tiny(tmp_path, optimizer=optimizer, micro_batch_size=size) for size in (0, 1))
    torch.testing.assert_close(weights_after(whole), weights_after(quarters), rtol=0, atol=1e-6)


def test_the_step_minimizes_the_mean_over_all_tokens(tmp_path):
    trainer = Trainer(tiny(tmp_path, optimizer={"name": "sgd", "lr": 0.5, "max_grad_norm": 0.0}, micro_batch_size=2))
    windows = trainer.windows.batch(0, 4)
    logits = trainer.model(windows[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
    wanted = {
        n: p.detach() - 0.5 * lr_multiplier(0, 8, 0.05, 0.4) * p.grad for n, p in trainer.model.named_parameters()
    }
    trainer.model.zero_grad()
    trainer.train_step()
    for name, param in trainer.model.named_parameters():
        torch.testing.assert_close(param.detach(), wanted[name], rtol=0, atol=1e-6)


def test_evaluation_is_the_mean_over_the_validation_tokens(tmp_path):
    trainer = Trainer(tiny(tmp_path))
    for _ in range(4):
        trainer.train_step()
    (tokens,) = [torch.from_numpy(np.array(part)).long() for part in trainer.validation]
    losses = []
    for begin in range(0, len(tokens) - 1, 16):
        part = tokens[begin : begin + 17]
        losses += F.cross_entropy(trainer.model(part[None, :-1])[0], part[1:], reduction="none").tolist()
    assert len(losses) == len(tokens) - 1
    assert trainer.evaluate() == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_schedule():
    values = [lr_multiplier(step, 20, 0.2, 0.5) for step in range(20)]
    assert values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert values[10:] == pytest.approx([1 - i / 10 for i in range(10)])
    assert [lr_multiplier(step, 3, 0, 0) for step in range(3)] == [1, 1, 1]


def test_every_group_keeps_its_own_rate_and_momentum_warms_up(tmp_path):
    optimizer = {"name": "muon", "lr": 0.04, "adamw_lr": 0.001, "beta": 0.9, "beta_start": 0.5, "beta_warmup_steps": 4}
    trainer = Trainer(tiny(tmp_path, optimizer=optimizer, steps=10, warmup=0.2, cooldown=0.0))
    seen = []
    for _ in range(6):
        trainer.train_step()
        (muon,), (rest,) = (o.param_groups for o in trainer.optimizers)
        assert rest["lr"] == pytest.approx(muon["lr"] / 40)
        seen.append((muon["lr"], muon["momentum"]))
    assert [lr for lr, _ in seen] == pytest.approx([0.02, 0.04, 0.04, 0.04, 0.04, 0.04])
    assert [beta for _, beta in seen] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(tmp_path, name):
    options = {"name": name, "lr": {"adamw": 0.01, "adam": 0.01, "sgd": 0.3}.get(name, 0.05)}
    options |= {key: value for key, value in {"rank": 4, "adamw_lr": 0.02}.items() if key in METHODS[name].defaults}
    result = run_quietly(tiny(tmp_path, optimizer=options, steps=40, eval_every=40))
    assert result["validation_loss"] < 0.6 * math.log(256)


OTHER = {
    "lr": 0.007,
    "adamw_lr": 0.004,
    "rank": 3,
    "beta": 0.5,
    "beta_start": 0.1,
    "beta_warmup_steps": 5,
    "betas": (0.5, 0.6),
    "eps": 1e-2,
    "weight_decay": 0.5,
    "complement": 2.0,
    "lr_scale": "match_rms_adamw",
    "attach": "none",
    "gap": 1,
    "scale": 0.5,
    "max_grad_norm": 1e-3,
    "head_lr": 0.003,
    "eta1": 0.7,
    "eta2": 0.4,
    "clip_eps": 1e3,
    "max_value": 0.02,
    "ns_steps": 2,
    "gradient_scale": 3.0,
}
# What it takes for a setting to act.
WITH = {"beta_start": {"beta_warmup_steps": 5}, "use_current_projection": {"eta2": 0.5}}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, m in METHODS.items() for key in m.defaults])
def test_every_setting_of_every_method_takes_effect(tmp_path, name, key):
    fixed = {"name": name} | ({"rank": 4} if "rank" in METHODS[name].defaults else {})
    fixed |= WITH.get(key, {})
    value = not METHODS[name].defaults[key] if isinstance(METHODS[name].defaults[key], bool) else OTHER[key]
    changed = weights_after(tiny(tmp_path, optimizer=fixed | {key: value}), steps=5)
    assert not torch.equal(weights_after(tiny(tmp_path, optimizer=fixed), steps=5), changed)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ROWS])
def test_decay_and_betas_reach_every_group(tmp_path, name):
    given = {key: OTHER[key] for key in ("weight_decay", "betas") if key in METHODS[name].defaults}
    fits = {"rank": 4} if "rank" in METHODS[name].defaults else {}
    trainer = Trainer(tiny(tmp_path, optimizer={"name": name} | fits | given))
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            assert {key: group[key] for key in given if key in group}.items() <= given.items()
            assert "weight_decay" in group


def test_attached_training_is_the_same_and_holds_less(tmp_path):
    held, weights = {}, {}
    for attach in ("none", "auto", "release"):
        optimizer = {"name": "mofasgd", "rank": 2, "attach": attach, "max_grad_norm": 0.5}
        trainer = Trainer(tiny(tmp_path, optimizer=optimizer, micro_batch_size=2))
        for _ in range(8):
            trainer.train_step()
        held[attach] = trainer.gradient_bytes
        weights[attach] = torch.cat([param.detach().flatten() for param in trainer.model.parameters()])
    blocks = list(trainer.model.blocks.parameters())
    # (m + n) r sketches in the place of m n gradients; embedding and head keep theirs.
    saved = sum(p.numel() - 2 * sum(p.shape) for p in blocks) * 4
    assert held["none"] - held["auto"] == held["none"] - held["release"] == saved
    for attach in ("auto", "release"):
        torch.testing.assert_close(weights[attach], weights["none"], rtol=0, atol=1e-4)


def test_the_complement_steps_in_backward_where_it_can(tmp_path):
    def handle(**options):
        optimizer = {"name": "mofasgd", "rank": 2, "complement": 1.0} | options.pop("optimizer", {})
        return Trainer(tiny(tmp_path, optimizer=optimizer, **options)).handle

    assert handle().stepping
    assert handle(micro_batch_size=2) is None
    assert handle(optimizer={"max_grad_norm": 1.0}) is None
    with pytest.raises(ValueError, match="steps during backward: leave out micro_batch_size=2"):
        handle(micro_batch_size=2, optimizer={"attach": "release"})
    with pytest.raises(ValueError, match="complement"):
        handle(optimizer={"attach": "sketch"})


def test_settings_and_table_are_complete():
    settings = {f.name for f in dataclasses.fields(OptimizerConfig)} - {"name"}
    assert set().union(*(m.defaults for m in METHODS.values())) == settings
    assert all(f"{name}: " in table() for name in METHODS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "muonn"}, "did you mean 'muon'"),
        ({"name": "adamw", "rank": 8}, "optimizer.rank=8 does not apply to adamw.*setting of mofasgd, galore"),
        ({"name": "row_norm", "beta": 0.9}, "does not apply to row_norm"),
        ({"name": "muon", "lr": -1.0}, "optimizer.lr=-1.0 should be a number"),
        ({"name": "galore", "gap": 0}, "optimizer.gap=0 should be a whole number of at least 1"),
        ({"name": "mofasgd", "beta_start": 0.5}, "takes effect with optimizer.beta_warmup_steps only"),
        ({"name": "adam", "betas": (0.9, 1.0)}, "optimizer.betas=1.0"),
        ({"name": "mofasgd", "rank": 16}, "optimizer.rank=16 leaves no matrix of width 16 to factor"),
    ],
)
@pytest.mark.filterwarnings("ignore:nothing of this model")
def test_optimizer_mistakes(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(tmp_path, optimizer=options))


def test_precisions(tmp_path):
    losses = {}
    for precision in ("float32", "bf16-mixed", "bf16-true"):
        config = tiny(tmp_path, precision=precision, out=tmp_path / precision, steps=20, eval_every=20)
        losses[precision] = run_quietly(config)["validation_loss"]
        one, seen = Trainer(config), []
        assert {p.dtype for p in one.model.parameters()} == {
            torch.bfloat16 if precision == "bf16-true" else torch.float32
        }
        # Evaluated as it is trained.
        one.model.head.register_forward_hook(lambda module, args, logits, seen=seen: seen.append(logits.dtype))
        one.train_step(), one.evaluate()
        assert len(seen) > 1
        assert set(seen) == {torch.float32 if precision == "float32" else torch.bfloat16}
    # bfloat16 keeps 8 bits: the runs differ, and not by much.
    assert len(set(losses.values())) == 3
    assert max(losses.values()) - min(losses.values()) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 3}, "batch_size=4 is no multiple of micro_batch_size=3"),
        ({"warmup": 0.7}, "overlap"),
        ({"steps": 0}, "steps=0 should be a whole number"),
        ({"precision": "fp8"}, "precision='fp8' is unknown"),
        ({"device": "gpu9"}, "device='gpu9' is not usable"),
        ({"data": {"context": 5000}}, "data.context=5000 is longer than the data"),
    ],
)
def test_run_mistakes(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(tmp_path, **options))


def test_a_vocabulary_that_does_not_fit(tmp_path):
    config = tiny(tmp_path)
    config.model.vocab_size = 100
    with pytest.raises(ValueError, match=r"model\.vocab_size=100 is smaller than the tokenizer's vocabulary 256"):
        Trainer(config)
    shard = tmp_path / "a.bin"
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 500
    shard.write_bytes(header.tobytes() + np.full(500, 300, dtype="<u2").tobytes())
    config = tiny(tmp_path, data={"train": str(shard)})
    with pytest.raises(ValueError, match=r"model\.vocab_size is not given"):
        Trainer(config)
    config.model.vocab_size = 256
    with pytest.raises(ValueError, match=r"token 300.*vocabulary has 256"):
        Trainer(config).train_step()
