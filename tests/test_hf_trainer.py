"""transformers' Trainer with MoFaSGD: the steps, the logs, the checkpoints and the ends of a run."""

import copy
import json
import logging
import math
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_case import STEPS, Watch, arguments, by_hand, logged, make, samples, trainer_of  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from mofasgd.hf import MoFaSGDCallback, trainer_kwargs  # noqa: E402


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
    # Trainer's groups differ by their decay, and squares are summed group by group.
    assert logged(trainer) == pytest.approx(norms, rel=1e-14)
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


def test_reporters_are_shown_the_optimizers_norm(tmp_path, monkeypatch):
    shown = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            shown.extend([logs["grad_norm"]] if "grad_norm" in logs else [])

    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda report_to: [Reporter])
    watch = Watch()
    trainer_of(make("llama"), arguments(tmp_path, max_steps=3), [watch]).train()
    assert shown == watch.norms
    assert len(shown) == 3


class Limits(transformers.TrainerCallback):
    """Records what others are shown of args.max_grad_norm, and what the optimizer clips to."""

    def __init__(self):
        self.shown, self.used = set(), []

    def note(self, args, state, control, **kwargs):
        self.shown.add(args.max_grad_norm)

    on_train_begin = on_step_end = on_log = on_save = on_train_end = note

    def on_pre_optimizer_step(self, args, state, control, *, optimizer, **kwargs):
        self.used.append(optimizer.optimizer.max_grad_norm)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.note(args, state, control)
        args.max_grad_norm = [0.5, 0.25, -1.0, math.inf, 0.0][len(self.used) - 1]


@pytest.mark.parametrize("twice", [False, True])
def test_the_arguments_are_the_users_but_while_gradients_are_gathered(twice, tmp_path):
    limits = Limits()
    args = arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=1)
    trainer = trainer_of(make("llama"), args, [MoFaSGDCallback(), limits] if twice else [limits])
    trainer.train()
    assert limits.used == [0.5, 0.5, 0.25, None, None]
    assert limits.shown == {0.5, 0.25, -1.0, math.inf, 0.0}
    assert trainer.optimizer.optimizer.max_grad_norm is None
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


class Meddler(transformers.TrainerCallback):
    """Changes the arguments where this has no effect any more."""

    def on_step_begin(self, args, state, control, **kwargs):
        args.max_grad_norm = 0.25


def test_a_limit_set_while_gradients_are_gathered_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"args\.max_grad_norm=0\.25 was set.*on_step_end or on_optimizer_step"):
        trainer_of(make("llama"), arguments(tmp_path), [Meddler()]).train()


class EndEpoch(transformers.TrainerCallback):
    """Ends training within a window."""

    def on_substep_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = control.should_training_stop = True

    def on_evaluate(self, args, state, control, **kwargs):
        self.shown = args.max_grad_norm


def test_an_epoch_that_ends_within_a_window_gives_the_arguments_back(tmp_path):
    end = EndEpoch()
    trainer_of(make("llama"), arguments(tmp_path, eval_strategy="epoch"), [end]).train()
    assert end.shown == 0.5


@pytest.mark.parametrize("attach", ["auto", "none"])
def test_what_an_interrupted_training_leaves_behind_does_not_reach_the_next_trainer(attach, tmp_path, caplog):
    args, model = arguments(tmp_path, max_steps=2), make("llama")
    first = trainer_of(model, args, [Stop()])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    args = pickle.loads(pickle.dumps(copy.deepcopy(args)))
    model.load_state_dict(make("llama").state_dict())
    trainer = trainer_of(model, args, attach=attach)
    with caplog.at_level(logging.WARNING, "mofasgd"):
        trainer.train()
    assert caplog.text.count("still attached") == 1
    assert args.max_grad_norm == 0.5
    fresh = trainer_of(make("llama"), arguments(tmp_path, max_steps=2), attach=attach)
    fresh.train()
    assert same(model, fresh.model)
    assert logged(trainer) == logged(fresh)


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


def test_complement_trains_dense_or_steps_in_backward(tmp_path):
    args = arguments(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"complement=1\.0 needs the full gradient.*attach='none'"):
        trainer_of(make("llama"), args, complement=1.0).train()
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=4 does not go.*steps=1"):
        trainer_of(make("llama"), args, complement=1.0, attach="release").train()
    options = {"max_steps": 2, "gradient_accumulation_steps": 1}
    with pytest.raises(ValueError, match=r"max_grad_norm=0\.5 does not go.*set max_grad_norm=0"):
        trainer_of(make("llama"), arguments(tmp_path, **options), complement=1.0, attach="release").train()
    models = []
    for attach in ("none", "release"):
        models.append(make("llama"))
        args = arguments(tmp_path, **options, max_grad_norm=0.0)
        trainer_of(models[-1], args, complement=1.0, attach=attach).train()
    assert not same(models[0], make("llama"))
    for dense, stepped in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # One backward, the same products: only the order of the parameters differs.
        torch.testing.assert_close(stepped, dense, rtol=0, atol=1e-6)


class Halt(transformers.TrainerCallback):
    """Interrupts the first step after its backward."""

    armed = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt


def test_a_training_interrupted_between_backward_and_step_goes_on(tmp_path):
    args = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=1, max_grad_norm=0.0)
    trainer = trainer_of(make("llama"), args, [Halt()], complement=1.0, attach="release")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(math.isfinite(line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line)


def test_an_optimizer_detached_by_another_training_attaches_again(tmp_path):
    model, watch = make("llama"), Watch()
    first = trainer_of(model, arguments(tmp_path, max_steps=1), [Stop(), watch])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer_of(model, arguments(tmp_path, max_steps=1), [Stop()])
    with pytest.raises(KeyboardInterrupt):
        second.train()
    first.train()
    assert watch.held == set()
    assert len(watch.norms) == 1


class Broken(torch.nn.Module):
    """A model whose loss is not finite in its third micro-batch."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = make("llama"), 0

    def forward(self, input_ids, labels):
        self.calls += 1
        return self.inner(input_ids=input_ids, labels=labels).loss[None] * (math.nan if self.calls == 3 else 1.0)


def test_the_log_counts_steps_whose_gradients_were_not_finite(tmp_path):
    trainer = trainer_of(Broken(), arguments(tmp_path, max_steps=3, gradient_accumulation_steps=1))
    with pytest.warns(UserWarning, match="1 steps had a gradient that was not finite"):
        trainer.train()
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert [line.get("nonfinite_steps") for line in lines] == [None, None, 1]


def test_a_resume_with_other_options_says_that_the_checkpoints_are_used(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer_of(make("llama"), arguments(tmp_path, **options)).train()
    # Also where nothing decayed the groups are those of a run that decays.
    trainer = trainer_of(make("llama"), arguments(tmp_path, weight_decay=0.1, **options), rank=6, beta=0.9)
    with pytest.warns(
        UserWarning, match=r"beta=0\.95 instead of 0\.9, rank=4 instead of 6, weight_decay=0\.0 instead of 0"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert {group["rank"] for group in trainer.optimizer.param_groups if "rank" in group} == {4}


def test_the_seq2seq_trainer_takes_the_optimizer_as_an_attribute(tmp_path):
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    args = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no"
    )
    watch = Watch()
    kwargs = trainer_kwargs(args, rank=4, lr=0.02, callbacks=[watch])
    trainer = transformers.Seq2SeqTrainer(
        model=model, args=args, train_dataset=samples(), callbacks=kwargs["callbacks"]
    )
    trainer.optimizer_cls_and_kwargs = kwargs["optimizer_cls_and_kwargs"]
    trainer.train()
    assert logged(trainer) == watch.norms
    assert watch.held == set()


def test_no_training_leaves_its_limit_to_the_next(tmp_path):
    limits = Limits()
    trainer = trainer_of(make("llama"), arguments(tmp_path, max_steps=1), [limits, Halt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.args.max_grad_norm = 0.25
    trainer.train()
    assert limits.used == [0.5, 0.25]
    assert trainer.optimizer.optimizer.max_grad_norm is None
