"""transformers' Trainer with MoFaSGD: the steps, the logs, the checkpoints and the ends of a run."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_case import STEPS, Watch, arguments, by_hand, logged, make, samples, trainer_of  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from mofasgd.hf import trainer_kwargs  # noqa: E402


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def flat(opt):
    return {(i, key): value for i, own in opt.state_dict()["state"].items() for key, value in own.items()}


CASES = [(name, dtype) for name in ("llama", "gpt2", "bert") for dtype in (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_resumed_at_half_time_a_run_ends_as_the_unbroken_one_bit_for_bit(name, dtype, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 15, "train_sampling_strategy": "random"}
    options |= {"eval_strategy": "steps", "eval_steps": 10}
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-15")):
        watch = Watch()
        trainer = trainer_of(make(name, dtype), arguments(tmp_path, **options), [watch])
        trainer.train(resume_from_checkpoint=resume)
        assert watch.held == set()
        # Evaluation in between neither steps nor adds to a norm.
        assert logged(trainer)[-len(watch.norms) :] == watch.norms
        runs.append((trainer.model, trainer.optimizer.optimizer, watch.norms, logged(trainer, "eval_loss")))
    (model, opt, norms, losses), (resumed, other, later, again) = runs
    assert len(norms) == STEPS
    assert later == norms[15:]
    assert again == losses
    assert same(model, resumed)
    states = flat(opt), flat(other)
    assert states[0].keys() == states[1].keys()
    assert {value.dtype for (_, key), value in states[1].items() if key in "UsV"} == {torch.float32}
    assert all(value.dtype == states[1][key].dtype for key, value in states[0].items())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("attach", ["auto", "none"])
def test_a_trainer_takes_the_steps_of_a_loop_without_one(attach, tmp_path):
    args = arguments(tmp_path, max_steps=12)
    model, other, unclipped = (make("bert") for _ in range(3))
    trainer = trainer_of(model, args, attach=attach)
    trainer.train()
    norms, independent = by_hand(other, args, attach, steps=12)
    assert same(model, other)
    assert logged(trainer) == norms
    if attach == "none":
        # float32 sketches against float64 projections of G.
        assert norms == pytest.approx(independent, rel=1e-5)
    # Clipping matters: AdamW's moments and the momentum weigh windows by their size.
    assert min(norms) > args.max_grad_norm
    by_hand(unclipped, arguments(tmp_path, max_grad_norm=0.0), attach, steps=12)
    assert not same(model, unclipped)


def test_weights_decay_where_trainer_would_decay_them(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(16, 12), torch.nn.LayerNorm(12)
            self.relative_attention_bias = torch.nn.Embedding(7, 9)  # a matrix, but Trainer does not decay it
            self.gamma = torch.nn.Parameter(torch.ones(12))  # a vector, but it does

    model = Odd()
    args = arguments(tmp_path, weight_decay=0.1)
    ours = trainer_of(model, args, attach="none").create_optimizer()
    theirs = transformers.Trainer(model=model, args=args, train_dataset=[0]).create_optimizer()
    decays = [{p: g["weight_decay"] for g in opt.param_groups for p in g["params"]} for opt in (ours, theirs)]
    assert decays[0] == decays[1]
    assert {decays[0][model.gamma], decays[0][model.relative_attention_bias.weight]} == {0.1, 0.0}


def test_what_the_arguments_say_reaches_the_optimizer_when_training_begins(tmp_path):
    args = arguments(tmp_path, max_steps=1, adam_beta2=0.97, adam_epsilon=1e-7, seed=5)
    trainer = trainer_of(None, args, lr=None, lr_scale="match_rms_adamw", model_init=lambda: make("llama"))
    seen = []
    for lr in (1e-3, 2e-3):  # as a hyperparameter search changes it
        args.learning_rate = lr
        trainer.train()
        opt = trainer.optimizer.optimizer
        seen.append({group["initial_lr"] for group in opt.param_groups})
    assert seen == [{1e-3}, {2e-3}]
    adamw = opt.param_groups[-1]
    assert (adamw["betas"], adamw["eps"], opt.seed, opt.defaults["lr"]) == ((0.9, 0.97), 1e-7, 5, 2e-3)


@pytest.mark.parametrize("joined", [lambda ours, more: ours + more, lambda ours, more: more + ours])
def test_reporters_are_shown_the_optimizers_norm(joined, tmp_path, monkeypatch):
    shown = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            shown.extend([logs["grad_norm"]] if "grad_norm" in logs else [])

    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda report_to: [Reporter])
    args, watch = arguments(tmp_path, max_steps=3), Watch()
    kwargs = trainer_kwargs(args, rank=4, lr=0.02)
    kwargs["callbacks"] = joined(kwargs["callbacks"], [watch])
    transformers.Trainer(model=make("llama"), args=args, train_dataset=samples(), **kwargs).train()
    assert shown == watch.norms


class Limits(transformers.TrainerCallback):
    """Records what others are shown of args.max_grad_norm, and what the optimizer clips to."""

    def __init__(self):
        self.shown, self.used = set(), []

    def note(self, args, state, control, **kwargs):
        self.shown.add(args.max_grad_norm)

    on_train_begin = on_step_end = on_log = on_save = on_train_end = note

    def on_optimizer_step(self, args, state, control, *, optimizer, **kwargs):
        self.used.append(optimizer.optimizer.max_grad_norm)
        args.max_grad_norm = [0.5, 0.25, -1.0, 0.0][len(self.used) - 1]


def test_the_arguments_are_the_users_but_while_gradients_are_gathered(tmp_path):
    limits = Limits()
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    trainer_of(make("llama"), args, [limits]).train()
    assert limits.used == [0.5, 0.5, 0.25, None]
    assert limits.shown == {0.5, 0.25, -1.0, 0.0}
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.max_grad_norm == 0.5


class Stop(transformers.TrainerCallback):
    """Interrupts the first window after its second micro-batch."""

    armed = True

    def on_substep_end(self, args, state, control, *, optimizer, **kwargs):
        self.after = getattr(self, "after", 0) + 1
        if self.armed and self.after == 2:
            self.armed = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("compiled", [False, True])
def test_an_interrupted_window_is_no_part_of_the_next_training(compiled, tmp_path):
    # Compiled, the model that Trainer's zero_grad() reaches is a wrapper.
    options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    args = arguments(tmp_path, max_steps=2, **options)
    whole = trainer_of(make("llama"), args)
    whole.train()
    stopped = trainer_of(make("llama"), args, [Stop()])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    stopped.train()
    assert args.max_grad_norm == 0.5
    assert logged(stopped) == logged(whole)
    assert same(stopped.model, whole.model)


def test_trained_twice_a_model_is_attached_twice_and_free_in_between(tmp_path):
    plain, model, watch = make("llama"), make("llama"), Watch()
    trainer = trainer_of(model, arguments(tmp_path, max_steps=2), [watch])
    for steps in (2, 4):
        trainer.train()
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert all(p._post_accumulate_grad_hooks is None for p in model.parameters())
        assert trainer.optimizer.optimizer._handle is None
        assert len(watch.norms) == steps
    assert watch.held == set()
    # Free means that a loop without the library sees gradients again.
    model(input_ids=samples(2)[0]["input_ids"][None], labels=samples(2)[0]["labels"][None]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_best_model_comes_back_and_checkpoints_are_a_plain_models(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = trainer_of(make("gpt2"), arguments(tmp_path / "run", **options), lr=0.5)
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = tmp_path / "run" / f"checkpoint-{2 * losses.index(min(losses)) + 2}"
    assert str(best) == trainer.state.best_model_checkpoint
    make("gpt2").save_pretrained(tmp_path / "plain")
    files = [load_file(path / "model.safetensors") for path in (best, tmp_path / "plain")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, trainer.model.state_dict()[key]) for key, value in files[0].items())
    configs = [json.loads((path / "config.json").read_text()) for path in (best, tmp_path / "plain")]
    assert configs[0]["architectures"] == configs[1]["architectures"] == ["GPT2LMHeadModel"]


def test_complement_trains_dense(tmp_path):
    args = arguments(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"complement=1\.0 needs the full gradient.*attach='none'"):
        trainer_of(make("llama"), args, complement=1.0).train()
    model = make("llama")
    trainer_of(model, args, complement=1.0, attach="none").train()
    assert not same(model, make("llama"))
