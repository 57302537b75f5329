"""The published LLaMA-Factory with MoFaSGD, in an environment of its own: make test-llamafactory."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("llamafactory")

from authors_case import Theirs
from llamafactory_case import FORK, OURS, configuration, write_model
from safetensors.torch import load_file
from transformers import Seq2SeqTrainer, Trainer

from mofasgd import MoFaSGD
from mofasgd.authors import AuthorsMFSGD
from mofasgd.hf import MoFaSGDCallback
from mofasgd.hf.llamafactory import upstream
from mofasgd.hf.llamafactory.__main__ import main, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    write_model(path)
    return path


@pytest.fixture
def trainers(monkeypatch):
    """A list that receives every Trainer that is made."""
    made, original = [], Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *a, **k: (made.append(self), original(self, *a, **k))[1])
    return made


def trained(out):
    return load_file(out / "trained" / "model.safetensors")


def test_the_version_is_the_one_that_was_read():
    assert upstream.VERSION == upstream.TESTED


@pytest.mark.parametrize("stage", upstream.STAGES)
def test_every_stage_trains_with_the_optimizer_of_the_keys(folder, tmp_path, stage, trainers):
    prepare([configuration(folder, tmp_path, stage, **OURS)])()
    opt = trainers[-1].optimizer.optimizer
    assert type(opt) is MoFaSGD
    # The loss's last layer is not the output embedding everywhere; the matrices of the blocks are factored in any case.
    assert sum(len(g["params"]) for g in opt.param_groups if g["algorithm"] == "mofasgd") >= 14
    assert opt.handle is None
    # Before the reporters, which would be shown Trainer's norm.
    assert type(trainers[-1].callback_handler.callbacks[0]) is MoFaSGDCallback
    lines = [line for line in trainers[-1].state.log_history if "grad_norm" in line]
    assert len(lines) == 3
    assert lines[-1]["grad_norm"] == pytest.approx(opt.grad_norm().item())


def test_the_authors_configuration_takes_the_forks_steps(folder, tmp_path, monkeypatch):
    """Two steps of four micro-batches, their gradients summed on dense matrices; clipping acts on AdamW's part."""
    windows = []
    original = Seq2SeqTrainer.training_step

    def training_step(self, model, inputs, count=None):
        if len(windows) == 0 or len(windows[-1][1]) == 4:
            windows.append((copy.deepcopy(self.model), []))
        windows[-1][1].append(({key: value.clone() for key, value in inputs.items()}, count))
        return original(self, model, inputs, count)

    monkeypatch.setattr(Seq2SeqTrainer, "training_step", training_step)
    path = configuration(folder, tmp_path, **FORK, max_steps=3, max_grad_norm=1e-3)
    prepare([path])()
    starts = [{name: p.detach().double().numpy() for name, p in model.named_parameters()} for model, _ in windows]
    blocks = [name for name in starts[0] if "layers" in name and starts[0][name].ndim == 2]
    assert len(blocks) == 14
    theirs = {name: Theirs(starts[0][name], 4) for name in blocks}
    for (model, micros), before, after in zip(windows, starts, starts[1:], strict=False):
        free = type(model)(model.config)  # the copy's hooks would sketch
        free.load_state_dict({name: p.detach() for name, p in model.named_parameters()}, strict=False)
        for inputs, count in micros:
            logits = free(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
            labels = inputs["labels"][:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            (loss / count).backward()
        grads = {name: p.grad.double().numpy() for name, p in free.named_parameters()}
        for name in blocks:
            expected = theirs[name].step(before[name], grads[name], 1e-3, 0.9, 0.5, 1e-8, 10)
            assert abs(after[name] - expected).max() <= 2e-6
            assert abs(after[name] - before[name]).max() >= 1e-4
    # The first step of Adam is lr times the sign of what is not tiny.
    moved = abs(starts[1]["lm_head.weight"] - starts[0]["lm_head.weight"]).max()
    assert moved == pytest.approx(2e-4, rel=0.05)


@pytest.mark.parametrize("keys", [FORK, OURS], ids=["fork", "ours"])
def test_a_resumed_run_ends_as_the_unbroken_one(folder, tmp_path, keys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    # 32 rows: the fourth step ends the epoch, so that the resumed run has no batches to skip.
    options = keys | {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "save_only_model": False}
    prepare([configuration(folder, whole, **options)])()
    prepare([configuration(folder, broken, **options)])()
    (broken / "trained" / "model.safetensors").unlink()
    path = configuration(folder, broken, **options, resume_from_checkpoint=str(broken / "trained" / "checkpoint-4"))
    prepare([path])()
    left, right = trained(whole), trained(broken)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_without_our_keys_it_is_llamafactory(folder, tmp_path, trainers):
    prepare([configuration(folder, tmp_path, max_steps=1)])()
    assert type(trainers[-1].optimizer.optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**FORK, "mfsgd_eta2": 1.0}, "mfsgd_eta2=1.0 would be without effect"),
        ({**FORK, "mfsgd_rank": 0}, "rank=0 should be a whole number of at least 1"),
        ({**FORK, "mfsgd_eps": -1.0}, "eps=-1.0 should be a number"),
        ({**FORK, "learning_rte": 1}, "did you mean 'learning_rate'"),
        ({**OURS, "mofasgd_rnk": 3}, "unknown option 'rnk'; did you mean 'rank'"),
        ({**OURS, "mofasgd_lr": None}, "no default learning rate"),
        ({**OURS, "mofasgd_attach": "sketched"}, "mofasgd_attach='sketched' is unknown; did you mean 'sketch'"),
        ({**OURS, "finetuning_type": "lora"}, "finetuning_type='lora' trains small adapters"),
        (
            {**OURS, "stage": "ppo", "reward_model": "x", "reward_model_type": "full"},
            "stage='ppo' makes its optimizer elsewhere",
        ),
        ({**OURS, "use_muon": True}, "use_muon: true and use_mofasgd: true ask for two optimizers"),
        ({**OURS, "do_train": False}, "use_mofasgd: true would be without effect: nothing is trained"),
        ({**OURS, "optim": "sgd"}, "optim='sgd' has no effect"),
        ({**FORK, "optim": "adafactor"}, "optim='adafactor' has no effect, MoFaSGD replaces it"),
        ({**FORK, "optim_args": "a=1"}, "optim_args='a=1' has no effect"),
        ({**FORK, "optim_target_modules": ["q"]}, "optim_target_modules=['q'] has no effect"),
        ({**FORK, "learning_rate_adamw": "abc"}, "learning_rate_adamw='abc' should be a number"),
        ({**FORK, "learning_rate_mfsgd": -1.0}, "learning_rate_mfsgd=-1.0 should be a number"),
        ({**FORK, "adam_beta1": 2.0}, "betas[0]=2.0 should be a number"),
        ({**FORK, "use_galore": True}, "use_galore: true and use_mfsgd: true ask for two optimizers"),
        ({**OURS, "use_badam": True}, "use_badam: true and use_mofasgd: true ask for two optimizers"),
        ({**FORK, "deepspeed": "ds.json"}, "deepspeed='ds.json' shards what MoFaSGD steps"),
        ({"profile_memory_from_start": True}, "profile_memory_* records allocations of a CUDA device"),
    ],
)
def test_a_mistake_ends_in_one_line_before_a_model_is_loaded(folder, tmp_path, capsys, changes, message):
    path = configuration(folder, tmp_path, **{"model_name_or_path": "/nowhere", **changes})
    assert main(["train", path]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mofasgd-llamafactory: error: ")
    assert message in error


def test_wrong_calls(capsys, tmp_path):
    assert main(["chat"]) == 2
    assert "llamafactory-cli has the others" in capsys.readouterr().err
    assert main(["train"]) == main(["train", "a.json"]) == 1
    assert "train takes a YAML file, not 'a.json'" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 1
    assert main(["--help"]) == 0


def test_a_trainer_that_gets_its_optimizer_elsewhere_is_noticed(folder, tmp_path, monkeypatch):
    """What another version of LLaMA-Factory may do to the one name that is replaced."""
    import llamafactory.train.sft.trainer as module

    run = prepare([configuration(folder, tmp_path, **FORK)])
    with monkeypatch.context() as patch:
        patch.setattr(module, "create_custom_optimizer", lambda model, args: None)
        with pytest.raises(RuntimeError, match=r"has no create_custom_optimizer.*pip install llamafactory==0\.9\.5"):
            run()
    with monkeypatch.context() as patch:
        patch.setattr(module.CustomSeq2SeqTrainer, "create_optimizer", Trainer.create_optimizer)
        with pytest.raises(ValueError, match="found AdamW, not MoFaSGD"):
            run()
    assert module.create_custom_optimizer.__module__ == "llamafactory.train.trainer_utils"


def test_memory_is_recorded_over_what_was_asked_for(folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("mofasgd.hf.llamafactory.__main__.check_recordable", lambda key: None)
    monkeypatch.setattr("mofasgd.hf.llamafactory.optimizers.start_recording", lambda n: seen.append(f"start {n}"))
    monkeypatch.setattr("mofasgd.hf.llamafactory.optimizers.save_recording", lambda path: seen.append(path.name))
    original = Seq2SeqTrainer.training_step
    step = lambda self, *a, **k: (seen.append("micro"), original(self, *a, **k))[1]  # noqa: E731
    monkeypatch.setattr(Seq2SeqTrainer, "training_step", step)
    for keys, micros in [
        ({"profile_memory_from_start": True, "profile_memory_max_entries": 7, "profile_memory_stop_step": 2}, 8),
        ({"profile_memory_stop_accumulation_step": 3}, 3),
        ({"profile_memory_stop_accumulation_step": 9}, 4),
        ({"profile_memory_from_start": True}, 12),
    ]:
        seen.clear()
        prepare([configuration(folder, tmp_path, **OURS, **keys, overwrite_output_dir=True)])()
        expected = [f"start {keys.get('profile_memory_max_entries', 1_000_000)}", *["micro"] * micros, "memory.pickle"]
        assert seen == [*expected, *["micro"] * (12 - micros)]


def test_two_processes_train_one_model(folder, tmp_path):
    path = configuration(folder, tmp_path, **FORK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mofasgd.hf.llamafactory", "train", path, "gradient_accumulation_steps=2", "max_grad_norm=0"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "training with AuthorsMFSGD, attached: none" in done.stderr
    together = trained(tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    prepare([configuration(folder, alone, **FORK, max_grad_norm=0.0)])()
    single = trained(alone)
    initial = load_file(folder / "model" / "model.safetensors")
    for name, value in single.items():
        # The same eight rows a step, in another order of summation; Adam's first steps turn on signs.
        assert (together[name] - value).abs().max() <= 0.1 * (value - initial[name]).abs().max() + 1e-6, name
    assert json.loads((tmp_path / "trained" / "trainer_state.json").read_text())["global_step"] == 3


def test_the_authors_step_and_ours_are_different_optimizers(folder, tmp_path, trainers):
    prepare([configuration(folder, tmp_path, **FORK, max_steps=1)])()
    opt = trainers[-1].optimizer.optimizer
    assert type(opt) is AuthorsMFSGD
    matrices, rest = opt.param_groups
    assert (matrices["lr"], matrices["rank"], matrices["eta1"], matrices["max_value"]) == (1e-3, 4, 0.5, 10)
    assert (rest["algorithm"], rest["lr"], len(matrices["params"]), len(rest["params"])) == ("adamw", 2e-4, 14, 7)
