"""How a `mofasgd finetune` run may end early, what it leaves then, and what another start makes of that."""

import contextlib
import json
import os
import resource
import signal

import pytest
import torch
import yaml

pytest.importorskip("trl")
pytest.importorskip("peft")

import transformers
from safetensors.torch import load_file
from tune_case import TEMPLATE, VOCABULARY, config, run_quietly, save_llama, sums, tokenizer, write_rows

from mofasgd.app.display import Display
from mofasgd.app.errors import Stopped
from mofasgd.app.tune import answers, finetune
from mofasgd.app.tune.config import ProfileConfig
from mofasgd.app.tune.encode import encode
from mofasgd.app.tune.finetune import Session
from mofasgd.app.tune.models import load_tokenizer, room
from mofasgd.app.tune.profile import profile
from mofasgd.app.tune.rows import read_row
from mofasgd.app.tune.tuner import Tuner

AGAIN = r"mofasgd finetune --config .*config\.yaml --resume true"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def record(out):
    return json.loads((out / "run.json").read_text())


@contextlib.contextmanager
def files_end_at(size):
    """Let the system refuse to write a file beyond `size` bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- after the last step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "saved", "end", "told"),
    [
        ("adamw", True, signal.SIGTERM, "SIGTERM after the last step"),
        ("lora", False, signal.SIGINT, "SIGINT after the last step"),
        ("adamw", False, None, r"could not be examined \(KeyError: 'no such token'\)"),
    ],
)
def test_an_interrupted_examination_costs_no_training(tmp_path, model, monkeypatch, method, saved, end, told):
    keys = {"method": method, "lr": 0.05, "cooldown": 0.0, "steps": 3, "samples": 1, "max_new_tokens": 2}
    keys["log_every"] = 10  # no line of metrics that would tell of a run
    whole = config(tmp_path, model, out=tmp_path / "whole", **keys)
    expected = run_quietly(whole)
    calls, real, out = [], Session.loss, tmp_path / "run"

    def loss(self):
        calls.append(0)
        if len(calls) == 2:  # the first is before training
            # Even a kill would cost nothing now.
            there = bool(list(out.glob("*/*model.safetensors")))
            assert ("trained" in record(out), there) == (saved, saved)
            if end is None:
                raise KeyError("no such token")
            os.kill(os.getpid(), end)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "loss", loss)
        with pytest.raises(Stopped, match=rf"{told}.*: the trained model is in \S+\. Go on with: {AGAIN}"):
            run_quietly(config(tmp_path, model, save_model=saved, **keys))
    assert (out / "model").exists() == (saved and method == "adamw")
    with pytest.raises(ValueError, match="holds a run already"):
        run_quietly(config(tmp_path, model, **keys))
    with monkeypatch.context() as patch:
        patch.setattr(Tuner, "train", lambda *_, **__: pytest.fail("it was trained again"))
        result = run_quietly(config(tmp_path, model, resume=True, **keys))
    assert result["validation_loss"] == expected["validation_loss"]
    assert result["steps"] == 3
    assert result["peak_mb"] > 0
    ends = [load_file(folder / "model" / "model.safetensors") for folder in (whole.out, out)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    samples = [json.loads((folder / "samples.json").read_text()) for folder in (whole.out, out)]
    assert samples[0] == samples[1]
    assert (out / "adapter" / "adapter_model.safetensors").exists() == (method == "lora")
    # The folder's configuration makes such a run anew elsewhere.
    assert yaml.safe_load((out / "config.yaml").read_text())["resume"] is False


def test_a_signal_while_the_model_is_written_waits(tmp_path, model, monkeypatch):
    real = finetune.save

    def save(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        real(*arguments)

    monkeypatch.setattr(finetune, "save", save)
    with pytest.raises(Stopped, match=f"SIGTERM after the last step: the trained model is in .*Go on with: {AGAIN}"):
        run_quietly(config(tmp_path, model, steps=1, method="adamw"))
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")


def test_a_full_disk_is_one_line_and_no_step_is_taken_twice(tmp_path, model, monkeypatch):
    """The second call is refused room for the model only: its last checkpoint is the last step's."""
    # 6 steps a pass: the last step is the first of a pass that transformers would go on with.
    keys = {"method": "adamw", "lr": 0.01, "cooldown": 0.0, "steps": 7}
    whole = config(tmp_path, model, out=tmp_path / "whole", **keys)
    expected = run_quietly(whole)
    with files_end_at(2**16):
        with pytest.raises(
            Stopped, match=rf"run.checkpoints.checkpoint-2 could not be written .*no checkpoint.*{AGAIN}"
        ):
            run_quietly(config(tmp_path, model, checkpoint_every=2, **keys))
        with pytest.raises(Stopped, match=rf"other.model could not be written .*there is no checkpoint yet.*{AGAIN}"):
            run_quietly(config(tmp_path, model, out=tmp_path / "other", **keys))
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert not list((tmp_path / "other").glob("model*"))
    real = finetune.save

    def save(*arguments):
        with files_end_at(2**16):
            real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "save", save)
        with pytest.raises(Stopped, match=f"the checkpoint of step 7 is whole.*{AGAIN}"):
            run_quietly(config(tmp_path, model, resume=True, checkpoint_every=7, **keys))
    result = run_quietly(config(tmp_path, model, resume=True, **keys))
    for key in ("validation_loss", "steps", "optimizer_state_mb"):
        assert result[key] == expected[key]
    ends = [load_file(out / "model" / "model.safetensors") for out in (whole.out, tmp_path / "run")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_file_in_the_way_of_the_model_is_refused_before_training(tmp_path, model):
    run = config(tmp_path, model, method="adamw")
    run.out.mkdir()
    (run.out / "model").write_text("")
    with pytest.raises(ValueError, match=r"run.model is a file where the run writes a folder"):
        run_quietly(run)


# --- what a folder and its rows have to be ---------------------------------------------------------------------------


def test_what_is_refused_late_leaves_the_folder_free(tmp_path, model, monkeypatch):
    for wrong, message in [
        ({"factor": ["*wrong*"], "rank": 4}, r"factor='\*wrong\*' matches no"),
        ({"max_grad_norm": 1.0, "complement": 1.0, "attach": "release", "rank": 4}, "max_grad_norm=1 does not go with"),
        ({"method": "adamw", "freeze": ["*"]}, r"freeze=\['\*'\] leaves nothing to train"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(Session, "examine", lambda _: pytest.fail("examined before it was refused"))
            with pytest.raises(ValueError, match=message):
                run_quietly(config(tmp_path, model, **wrong))
    assert not (tmp_path / "run" / "run.json").exists()
    # Nor is what ended before its first line a run; asked to go on with it, a start from step 0 is said to be one.
    with monkeypatch.context() as patch:
        patch.setattr(Tuner, "train", lambda *_, **__: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            run_quietly(config(tmp_path, model, steps=1, method="adamw"))
    assert "before" in record(tmp_path / "run")
    assert run_quietly(config(tmp_path, model, steps=1, method="adamw", log_every=1))["steps"] == 1


def test_a_resume_refuses_other_validation_rows_and_says_where_it_begins(tmp_path, model, capsys):
    keys = {"steps": 1, "method": "adamw"}
    run_quietly(config(tmp_path, model, **keys))
    content = record(tmp_path / "run")
    for key in ("trained", "result"):
        del content[key]
    (tmp_path / "run" / "run.json").write_text(json.dumps(content))
    write_rows(tmp_path / "validation.jsonl", sums(60, 5))
    with pytest.raises(ValueError, match=r"data\.validation='\w+' was '\w+' in the run to be resumed"):
        run_quietly(config(tmp_path, model, resume=True, **keys))
    write_rows(tmp_path / "validation.jsonl", sums(50, 5))
    finetune.train(config(tmp_path, model, resume=True, **keys), Display())
    assert "there is no checkpoint yet: starting at step 0" in capsys.readouterr().out


# --- positions -------------------------------------------------------------------------------------------------------

_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "positions", "most"),
    [
        ("GPT2", 20, 20),
        ("OPT", 20, 20),
        ("Bert", 20, 20),
        ("Roberta", 22, 20),
        ("Llama", 20, None),
        ("Bloom", 20, None),
    ],
)
def test_the_room_is_what_the_model_takes(kind, positions, most):
    options = {**_SMALL, "max_position_embeddings": positions, "pad_token_id": 1}
    net = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options)).eval()
    assert room(net) == most
    net(input_ids=torch.full((1, most or 60), 5))
    if most is not None:
        with pytest.raises((IndexError, RuntimeError)):
            net(input_ids=torch.full((1, most + 1), 5))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY}
    special = {"eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **special)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_answers_end_where_the_positions_do(tmp_path, gpt2):
    """Rows that fit are trained on whatever data.context is; the answers take what is left of the positions."""
    net, tok = transformers.AutoModelForCausalLM.from_pretrained(gpt2), tokenizer()
    examples = [encode(tok, read_row({"question": "1" * n, "answer": "2"})) for n in (2, 9, 4, 10)]
    wrote = []
    real = net.generate
    net.generate = lambda **keys: wrote.append(real(**keys)) or wrote[-1]
    together = answers.write(net, tok, examples, 99, contextlib.nullcontext)
    assert [ids.shape[1] for ids in wrote] == [64] * len(wrote)
    assert together == [answers.write(net, tok, [e], 99, contextlib.nullcontext)[0] for e in examples]
    keys = {"method": "adamw", "steps": 1, "samples": 2}
    assert run_quietly(config(tmp_path, gpt2, {"context": 128}, **keys))["steps"] == 1
    write_rows(tmp_path / "validation.jsonl", [{"question": "1" * 50, "answer": "2"}])
    with pytest.raises(ValueError, match=r"a row has \d\d tokens, .* of 64 positions: lower data\.context=128 to 64"):
        run_quietly(config(tmp_path, gpt2, {"context": 128}, out=tmp_path / "long", **keys))
    with pytest.raises(ValueError, match=r"a row has 512 tokens, .* of 64 positions: lower context=512 to 64"):
        profile(ProfileConfig(model=str(gpt2), method="adamw", out=tmp_path / "profile", device="cpu", batch_size=1))


# --- tokenizers ------------------------------------------------------------------------------------------------------


def bare(folder, **special):
    """A model whose tokenizer has a chat template, and neither an end of text nor padding."""
    save_llama(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if "token_id" not in k}))
    inner = tokenizer().backend_tokenizer
    if not special:
        content = json.loads(inner.to_str())
        content["added_tokens"] = []
        inner = type(inner).from_str(json.dumps(content))
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE, **special)
    assert found.pad_token is None
    assert found.eos_token is None
    found.save_pretrained(folder)
    return folder


def test_a_tokenizer_without_end_or_padding_pads_with_what_it_has(tmp_path):
    folder = bare(tmp_path / "bare", additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    assert load_tokenizer(str(folder)).pad_token == "<pad>"  # its first that is no text
    run = config(tmp_path, folder, steps=1, samples=3, max_new_tokens=3, method="adamw")
    assert run_quietly(run)["steps"] == 1
    with pytest.raises(ValueError, match=r"none: its tokenizer has no special token at all to pad with"):
        load_tokenizer(str(bare(tmp_path / "none")))
