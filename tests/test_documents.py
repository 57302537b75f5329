"""What the documents show runs as it stands, with small stand-ins for what they leave out; names in them exist."""

import copy
import importlib
import re

import pytest
import torch
from attached import GPT, VOCABULARY, gpt_loss
from documents import PAGES, Loss, blocks, paragraphs

import mofasgd
from mofasgd import MoFaSGD, param_groups


def test_every_page_with_python_is_run_by_some_test():
    # README.md by test_architecture.py, distributed.md by test_dist_ddp.py and test_dist_fsdp.py.
    pages = {name for name in PAGES if blocks(name)}
    assert pages == {"README.md", "attach.md", "distributed.md", "finetuning.md", "huggingface.md", "torchrun.md"}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    text = PAGES[page].read_text()
    names = set(re.findall(r"\bmofasgd(?:\.\w+)+", text))
    if any(name.startswith("mofasgd.hf") for name in names):
        pytest.importorskip("transformers")
    for name in names:
        found = mofasgd
        path = name.split(".")
        for i, part in enumerate(path[1:], 2):
            found = getattr(found, part, None) or importlib.import_module(".".join(path[:i]))
    opt = MoFaSGD([torch.nn.Parameter(torch.zeros(2, 2))], rank=1)
    assert {name for name in re.findall(r"\bopt\.(\w+)", text) if not hasattr(opt, name)} == set()


def test_the_lines_on_attaching_take_the_dense_step():
    names = {"mofasgd": mofasgd, "model": GPT()}
    twin, tokens, held = copy.deepcopy(names["model"]), torch.randint(0, VOCABULARY, (4, 17)), []

    class Watched(Loss):
        def backward(self):
            super().backward()
            held.extend(tuple(p.shape) for p in names["model"].parameters() if p.grad is not None)

    names["loss"] = Watched(names, lambda model: gpt_loss(model, tokens))
    (lines,) = paragraphs("attach.md")
    exec(lines, names)
    assert names["opt"].handle is None
    assert len({shape for shape in held if len(shape) > 1}) == 1  # embedding and head, AdamW's
    opt = MoFaSGD(param_groups(twin, rank=32, lr=0.02, adamw_lr=3e-4))
    gpt_loss(twin, tokens).backward()
    opt.step()
    pairs = zip(names["model"].parameters(), twin.parameters(), strict=True)
    assert all((p - q).abs().max() <= 1e-5 for p, q in pairs)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_lines_on_distributed_checkpoints_bring_back_model_and_state(tmp_path):
    def make():
        model = GPT()
        opt = MoFaSGD(param_groups(model, rank=4, lr=0.02))
        return {"model": model, "opt": opt, "folder": tmp_path}

    def step(names):
        torch.manual_seed(1)
        gpt_loss(names["model"], torch.randint(0, VOCABULARY, (2, 17))).backward()
        names["opt"].step()
        names["opt"].zero_grad()
        return names["model"].state_dict()

    saved, loaded = make(), make()
    step(saved)
    *writing, reading = paragraphs("torchrun.md")
    for part in writing:
        exec(part, saved)
    exec(reading, {**saved, **loaded})
    after, again = step(saved), step(loaded)
    assert all(torch.equal(value, again[name]) for name, value in after.items())


def test_the_lines_on_trainer_train(tmp_path):
    pytest.importorskip("transformers")
    from hf_case import SIZES, arguments, logged, samples
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    class Mine(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 48, "intermediate_size": 64}))
    names = {"args": arguments(tmp_path, max_steps=3), "model": model, "data": samples(), "lr": 0.02, "mine": Mine()}
    for part in paragraphs("huggingface.md"):
        exec(part, names)
    trainer = names["trainer"]
    opt = trainer.optimizer.optimizer
    assert opt.factors(model.model.layers[0].mlp.up_proj.weight).s.shape == (32,)
    assert opt.handle is None
    assert names["mine"].steps == len([norm for norm in logged(trainer) if norm > 0]) == 3


def test_the_lines_on_a_plan_print_it(capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    names = {"model": transformers.LlamaConfig(vocab_size=128, **sizes)}
    (lines,) = paragraphs("finetuning.md")
    exec(lines, names)
    assert str(names["plan"]) in capsys.readouterr().out
    assert names["plan"].total > names["plan"].activations > 0
