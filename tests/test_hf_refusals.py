"""What mofasgd.hf refuses, naming the fix; the factory on its own."""

import sys
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_case import arguments, make, samples, trainer_of  # noqa: E402

from mofasgd import MoFaSGD, param_groups  # noqa: E402
from mofasgd.hf import MoFaSGDCallback, OptimizerFactory, trainer_kwargs  # noqa: E402


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {}, r"no default learning rate.*give lr=.*lr_scale='match_rms_adamw'.*args.learning_rate"),
        ({"lr": 0.02, "betta": 0.9}, {}, r"unknown option 'betta'; did you mean 'beta'\?"),
        ({"lr": 0.02, "layout": "stack"}, {}, "unknown option 'layout'"),
        ({"lr": 0.02, "max_grad_norm": 1.0}, {}, "max_grad_norm=1.0 belongs into TrainingArguments"),
        ({"lr": 0.02, "attach": "sketched"}, {}, r"attach='sketched' is unknown; did you mean 'sketch'\?"),
        ({"lr": 0.02}, {"optim_args": "rank=8"}, "optim_args='rank=8' has no effect"),
        ({"lr": 0.02}, {"optim": "lomo"}, "optim='lomo' has no effect.*leave it at 'adamw_torch'"),
        ({"lr": -1.0}, {}, r"lr=-1\.0 should be a number"),
        ({"lr": 0.02, "rank": 0}, {}, "rank=0 should be a whole number of at least 1"),
        ({"lr": 0.02}, {"weight_decay": -0.1}, r"weight_decay=-0\.1 should be a number"),
    ],
)
def test_mistakes_are_refused_before_a_trainer_is_made(options, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_kwargs(arguments(tmp_path, **changes), **options)


def test_something_else_than_arguments_is_refused(tmp_path):
    for other in (make("llama"), {"max_grad_norm": 1.0}):
        with pytest.raises(TypeError, match=f"args should be the TrainingArguments.*not {type(other).__name__}"):
            trainer_kwargs(other, lr=0.02)


def state(kind="NO", processes=1, precision="no"):
    return lambda: SimpleNamespace(distributed_type=kind, num_processes=processes, mixed_precision=precision)


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (state("DEEPSPEED"), "DEEPSPEED.*one process, or replicas.*torchrun"),
        (state("FSDP", 2), "FSDP.*one process, or replicas.*torchrun"),
        (state(precision="fp16"), "fp16.*bf16=True, or attach='none'"),
    ],
)
def test_setups_that_would_train_wrongly_are_refused_when_training_begins(setup, message, tmp_path, monkeypatch):
    trainer = trainer_of(make("llama"), arguments(tmp_path, max_steps=1))
    monkeypatch.setattr("mofasgd.hf.support.AcceleratorState", setup)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.optimizer is None
    # An optimizer that does not come from the factory meets the callback.
    model = make("llama")
    opt = MoFaSGD(param_groups(model, rank=4))
    opt.attach(model)
    options = {"callbacks": [MoFaSGDCallback()], "optimizers": (opt, None), "train_dataset": samples()}
    with pytest.raises(ValueError, match=message):
        transformers.Trainer(model=model, args=arguments(tmp_path, max_steps=1), **options).train()
    assert opt.handle is None


def test_other_arguments_than_the_trainers_are_refused(tmp_path):
    given = arguments(tmp_path, learning_rate=2e-3)
    for args in (arguments(tmp_path, max_steps=1, learning_rate=2e-3), arguments(tmp_path, max_steps=1)):
        kwargs = trainer_kwargs(given, rank=4, lr=0.02)
        trainer = transformers.Trainer(model=make("llama"), args=args, train_dataset=samples(), **kwargs)
        if args.learning_rate == given.learning_rate:
            trainer.train()
    with pytest.raises(ValueError, match=r"learning_rate=0\.001 of the trainer's.*with 0\.002: give both the same"):
        trainer.train()


def test_an_optimizer_that_clips_to_another_norm_is_refused(tmp_path):
    model, args = make("llama"), arguments(tmp_path, max_steps=1)
    opt = MoFaSGD(param_groups(model, rank=4), max_grad_norm=2.0)
    opt.attach(model)
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=samples(), callbacks=[MoFaSGDCallback()], optimizers=(opt, None)
    )
    with pytest.raises(ValueError, match=r"max_grad_norm=2\.0 is not args\.max_grad_norm=0\.5.*TrainingArguments only"):
        trainer.train()
    assert opt.handle is None
    opt.max_grad_norm = args.max_grad_norm
    for limit in (0.5, 0.25):
        args.max_grad_norm = limit
        trainer.train()


def test_fp16_is_refused_for_real(tmp_path):
    with pytest.raises(ValueError, match=r"fp16 needs a GradScaler.*bf16=True"):
        trainer_of(make("llama"), arguments(tmp_path, fp16=True)).train()


def test_dense_training_may_have_a_grad_scaler_and_several_processes(monkeypatch):
    for setup in (state(precision="fp16"), state("MULTI_GPU", 8)):
        monkeypatch.setattr("mofasgd.hf.support.AcceleratorState", setup)
        OptimizerFactory()(make("llama"), lr=0.02, rank=4, attach="none")


def test_several_gpus_in_one_process_are_refused(tmp_path):
    trainer = trainer_of(make("llama"), arguments(tmp_path))
    trainer.args._n_gpu, trainer.place_model_on_device = 2, False
    trainer._wrap_model = lambda model, *args, **kwargs: model  # DataParallel wants the GPUs
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*CUDA_VISIBLE_DEVICES"):
        trainer.train()
    assert trainer.optimizer is None


def test_a_trainer_that_got_the_callback_alone_says_so(tmp_path):
    kwargs = trainer_kwargs(arguments(tmp_path), lr=0.02)
    trainer = transformers.Trainer(
        model=make("llama"), args=arguments(tmp_path), train_dataset=samples(), callbacks=kwargs["callbacks"]
    )
    with pytest.raises(ValueError, match=r"found AdamW, not MoFaSGD.*optimizer_cls_and_kwargs"):
        trainer.train()


def import_beside(found, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mofasgd.hf")]:
        monkeypatch.delitem(sys.modules, name)
    # The package replaces its own module when it is first used.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", found)
    import mofasgd.hf  # noqa: F401


@pytest.mark.parametrize("found", ["4.57.1", "5.5.9", "unknown"])
def test_older_versions_of_transformers_are_refused_at_import(found, monkeypatch):
    with pytest.raises(ImportError, match=rf"transformers 5\.6 or newer but found {found}: pip install"):
        import_beside(found, monkeypatch)


@pytest.mark.parametrize("found", ["5.24.0.dev0", "6.0.0"])
def test_newer_versions_of_transformers_are_told_of_at_import(found, monkeypatch):
    with pytest.warns(UserWarning, match=rf"tested with transformers 5\.6 to 5\.23 but found {found}"):
        import_beside(found, monkeypatch)


def test_the_factory_alone_makes_an_attached_optimizer(tmp_path):
    model, args = make("llama"), arguments(tmp_path, adam_beta2=0.97)
    options = {"rank": 4, "adamw_lr": 1e-4, "factor": ["lm_head.weight"], "beta": 0.9, "max_grad_norm": 0.7}
    opt = OptimizerFactory()(model, lr=0.03, **options)
    factored, adamw = opt.param_groups[0], opt.param_groups[-1]
    assert any(p is model.lm_head.weight for p in factored["params"])
    assert (factored["lr"], factored["beta"], factored["rank"]) == (0.03, 0.9, 4)
    assert (adamw["lr"], opt.max_grad_norm) == (1e-4, 0.7)
    model(input_ids=samples(1)[0]["input_ids"][None], labels=samples(1)[0]["labels"][None]).loss.backward()
    assert {p.grad is None for p in factored["params"]} == {True}
    assert {p.grad is None for p in adamw["params"]} == {False}
    # Axolotl gives the arguments by position, whether or not they are among the keywords.
    for keywords in ({}, {"training_args": args}):
        opt = OptimizerFactory()(make("llama"), args, lr=0.03, rank=4, attach="none", **keywords)
        assert opt.param_groups[-1]["betas"] == (0.9, 0.97)
        assert opt._handle is None


def test_without_the_callback_trainer_steps_alike(tmp_path):
    models = [make("bert"), make("bert")]
    args = arguments(tmp_path, max_steps=4, max_grad_norm=0.0)
    trainer_of(models[0], args).train()
    # Nothing of the arguments but what is given here: a seed of 42 and AdamW as TrainingArguments has it.
    given = {"rank": 4, "lr": 0.02, "adamw_lr": 1e-3, "adamw_betas": (0.9, 0.999), "seed": 42}
    transformers.Trainer(
        model=models[1], args=args, train_dataset=samples(), optimizer_cls_and_kwargs=(OptimizerFactory, given)
    ).train()
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
