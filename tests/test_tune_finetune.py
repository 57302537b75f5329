"""`mofasgd finetune` end to end on a tiny model: what it learns, measures, leaves behind, refuses and resumes."""

import contextlib
import json
import os
import signal
import types

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from tune_case import config, run_quietly, save_llama, sums, tokenizer, write_rows

from mofasgd.app.errors import Diverged, Stopped
from mofasgd.app.tune import answers
from mofasgd.app.tune.encode import IGNORED, encode
from mofasgd.app.tune.finetune import Session
from mofasgd.app.tune.rows import read_row
from mofasgd.app.tune.tuner import Tuner

RATES = {"mofasgd": 0.05, "adamw": 0.01, "lora": 0.1, "galore": 0.05, "muon": 0.05}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def options(method, **more):
    """Settings under which the tiny model learns within a few steps."""
    found = {"method": method, "lr": RATES[method], **more}
    if method in ("mofasgd", "galore", "lora"):
        found["rank"] = 4
    if method in ("mofasgd", "galore", "muon"):
        found["adamw_lr"] = 0.01
    return found


def loss_by_hand(folder, rows):
    """The mean loss of the answers' tokens, one row at a time, of a saved model."""
    model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.eval()
    losses = []
    for row in rows:
        example = encode(tok, read_row(row))
        with torch.no_grad():
            chances = model(torch.tensor([example.input_ids])).logits[0].double().log_softmax(1)
        learned = [(i, label) for i, label in enumerate(example.labels) if label != IGNORED]
        losses += [-chances[i - 1, label].item() for i, label in learned]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("method", RATES)
def test_it_learns_and_saves_what_it_reports(tmp_path, model, method):
    run = config(tmp_path, model, steps=12, **options(method))
    result = run_quietly(run)
    record = json.loads((run.out / "run.json").read_text())
    assert record["result"] == result
    assert record["before"]["validation_loss"] == pytest.approx(loss_by_hand(model, sums(50, 5)), abs=1e-5)
    assert result["validation_loss"] < record["before"]["validation_loss"] - 0.25
    # The model in the folder is the one that was measured; adapters are in it.
    assert result["validation_loss"] == pytest.approx(loss_by_hand(run.out / "model", sums(50, 5)), abs=1e-4)
    assert (run.out / "adapter" / "adapter_model.safetensors").exists() == (method == "lora")
    trained, parameters = record["model"]["trainable_parameters"], record["model"]["parameters"]
    assert (trained < parameters) == (method == "lora")
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    # Linear cooldown after a warm-up of less than a step: before the sixth step seven of twelve are left.
    assert lines[2]["lr"] == pytest.approx(RATES[method] * 7 / (0.95 * 12))


def interrupt_at(monkeypatch, count):
    """Send SIGINT in the `count`-th evaluation of the validation loss."""
    calls, real = [], Session.loss

    def loss(self):
        calls.append(0)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    monkeypatch.setattr(Session, "loss", loss)


@pytest.mark.parametrize("method", ["mofasgd", "lora", "muon"])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, model, monkeypatch, method):
    kept = {"batch_size": 6, "micro_batch_size": 3, "eval_every": 3, "samples": 1, "max_new_tokens": 4}
    whole = config(tmp_path, model, out=tmp_path / "whole", **options(method), **kept)
    expected = run_quietly(whole)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)  # the first is before training
        with pytest.raises(Stopped, match=r"SIGINT at step 4: saved\. Go on with: mofasgd finetune --config .*resume"):
            run_quietly(config(tmp_path, model, **options(method), **kept))
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").exists()
    resumed = config(tmp_path, model, resume=True, **options(method), **kept)
    result = run_quietly(resumed)
    assert result["validation_loss"] == expected["validation_loss"]
    ends = [load_file(out / "model" / "model.safetensors") for out in (whole.out, resumed.out)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    records = [json.loads((out / "run.json").read_text()) for out in (whole.out, resumed.out)]
    assert records[0]["before"] == records[1]["before"]
    assert len(records[1]["sessions"]) == 2
    steps = [json.loads(line)["step"] for line in (resumed.out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 6
    # A further call has nothing to do.
    assert run_quietly(resumed) == result


def test_a_folder_that_does_not_fit_is_refused(tmp_path, model):
    run = config(tmp_path, model, steps=2, checkpoint_every=1, keep_checkpoints=1, **options("adamw"))
    with pytest.raises(ValueError, match="holds no run"):
        run_quietly(config(tmp_path, model, resume=True, **options("adamw")))
    run_quietly(run)
    assert [path.name for path in (run.out / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(ValueError, match="holds a run already: add --resume true"):
        run_quietly(run)
    with pytest.raises(ValueError, match=r"lr=0.02 was 0.01 in the run to be resumed"):
        run_quietly(config(tmp_path, model, steps=2, resume=True, method="adamw", lr=0.02))
    write_rows(tmp_path / "train.jsonl", sums(1, 24))
    with pytest.raises(ValueError, match=r"data='\w+' was '\w+'"):
        run_quietly(config(tmp_path, model, steps=2, resume=True, **options("adamw")))


def test_a_run_goes_on_from_its_newest_whole_checkpoint(tmp_path, model):
    for step in (9, 10, 11):
        (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    for step in (9, 10):
        (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    session = Session(config(tmp_path, model, resume=True, **options("adamw")), None)
    assert session.checkpoint.name == "checkpoint-10"


def test_packed_rows_do_not_see_each_other(tmp_path, model):
    """The loss of packs in one batch is that of the rows alone."""
    run = config(tmp_path, model, {"packing": True, "context": 128}, **options("adamw"))
    session = Session(run, None)
    data = session.trainer.train_dataset
    assert len(data) < len(session.train_rows) == 24
    batch = session.trainer.data_collator([data[i] for i in range(len(data))])
    session.trainer.model.eval()
    with torch.no_grad():
        packed = session.trainer.compute_loss(session.trainer.model, batch).item()
    alone, _ = answers.answer_loss(session.trainer.model, session.train_rows, session.autocast)
    assert packed == pytest.approx(alone, abs=1e-5)


def test_samples_and_exact_match_are_what_the_model_writes(tmp_path, model):
    rows = [{"question": "?", "answer": "#### 7"}]
    write_rows(tmp_path / "train.jsonl", rows * 24)
    write_rows(tmp_path / "validation.jsonl", rows * 3)
    run = config(tmp_path, model, steps=40, samples=2, exact_match=3, max_new_tokens=8, **options("adamw"))
    result = run_quietly(run)
    assert result["exact_match"] == 1.0
    assert json.loads((run.out / "run.json").read_text())["before"]["exact_match"] == 0.0
    samples = json.loads((run.out / "samples.json").read_text())
    assert [sample["after"] for sample in samples] == ["#### 7", "#### 7"]
    assert samples[0]["before"] != "#### 7"
    assert samples[0]["prompt"].endswith("<|im_start|>assistant\n")


def test_exact_match_is_of_the_first_rows_however_many_samples_there_are(tmp_path, model, monkeypatch):
    """Of the five rows the model gets the first right only."""
    found = ["#### 51", "#### 0", "#### 0", "#### 0", "#### 0"]
    monkeypatch.setattr("mofasgd.app.tune.finetune.write", lambda model, tok, rows, *rest: found[: len(rows)])
    for samples in (0, 1, 5):
        session = Session(config(tmp_path, model, exact_match=2, **options("adamw") | {"samples": samples}), None)
        metrics, texts = session.examine()
        assert (metrics["exact_match"], texts) == (0.5, found[:samples])


def test_the_speed_leaves_evaluations_and_the_first_log_interval_out(tmp_path, model, monkeypatch):
    """With a clock that goes on by so many seconds in each step and by 1000 in each evaluation."""
    now, seconds, tokens = [0.0], [100, 200, 1, 2, 3, 4], []

    def step(self, net, inputs, *rest):
        tokens.append(int((inputs["input_ids"] != 0).sum()))  # 0: padding
        now[0] += seconds[len(tokens) - 1]
        return trained(self, net, inputs, *rest)

    def loss(self):
        now[0] += 1000
        return evaluated(self)

    trained, evaluated = Tuner.training_step, Session.loss
    monkeypatch.setattr(Tuner, "training_step", step)
    monkeypatch.setattr(Session, "loss", loss)
    monkeypatch.setattr("mofasgd.app.usage.time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    run = config(tmp_path, model, eval_every=1, log_every=2, **options("adamw"))
    assert run_quietly(run)["tokens_per_second"] == pytest.approx(sum(tokens[2:]) / 10, abs=0.05)
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    logged = [(line["seconds"], line["tokens_per_second"]) for line in lines if "loss" in line]
    rates = [sum(tokens[i : i + 2]) / sum(seconds[i : i + 2]) for i in (0, 2, 4)]
    assert logged == [(s, pytest.approx(rate, abs=0.05)) for s, rate in zip((300, 303, 310), rates, strict=True)]


def test_answers_do_not_depend_on_the_batch(tmp_path, model, monkeypatch):
    """Prompts of different lengths, padded on the left, and losses padded on the right, as one at a time."""
    tok, net = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    rows = [{"question": "1" * n, "answer": "2" * (9 - n)} for n in (1, 5, 3)]
    examples = [encode(tok, read_row(row)) for row in rows]
    context = contextlib.nullcontext
    together = answers.write(net, tok, examples, 6, context), answers.answer_loss(net, examples, context)
    monkeypatch.setattr(answers, "_TOKENS", 1)
    apart = answers.write(net, tok, examples, 6, context), answers.answer_loss(net, examples, context)
    assert together[0] == apart[0]
    assert together[1] == (pytest.approx(apart[1][0], abs=1e-6), apart[1][1])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so #### 1,234", 1234.0),
        ("#### -3.5 apples", -3.5),
        ("3 and 4 make 7.", 7.0),
        ("cost $1,000.50", 1000.5),
        ("none", None),
        ("#### none of 3", 3.0),
        ("5 ####", None),
        ("#### 1 or #### 2", 2.0),
        ("#### 5, not 6", 5.0),
    ],
)
def test_the_final_number(text, number):
    assert answers.final_number(text) == number


def test_exact_match_needs_numbers_to_compare_with(tmp_path, model):
    write_rows(tmp_path / "train.jsonl", sums(0, 9))
    write_rows(tmp_path / "validation.jsonl", [{"question": "?", "answer": "seven"}])
    with pytest.raises(ValueError, match="after ####, which the answer 'seven' lacks: set exact_match to 0"):
        run_quietly(config(tmp_path, model, exact_match=1, **options("adamw")))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, model):
    with pytest.raises(Diverged, match=r"the loss is nan at step .*Lower lr"):
        run_quietly(config(tmp_path, model, log_every=1, method="adamw", lr=1e30))


def test_what_was_left_out_is_said_at_the_end(tmp_path, model, capsys):
    from mofasgd.app.display import Display
    from mofasgd.app.tune.finetune import train

    write_rows(tmp_path / "train.jsonl", [*sums(0, 9), {"question": "x" * 99, "answer": "1"}, 3])
    write_rows(tmp_path / "validation.jsonl", sums(50, 2))
    train(config(tmp_path, model, steps=1, **options("adamw")), Display())
    shown = capsys.readouterr().out
    assert (
        "2 rows left out: 1 that is no JSON object (the first: train.jsonl:11); 1 longer than data.context=64" in shown
    )


def test_wrong_models_are_named(tmp_path, model):
    for name, message in [
        ("", "model is empty"),
        (str(tmp_path / "no.gguf"), "there is no such file"),
        (str(tmp_path / "nothing"), "there is no such folder"),
        (str(tmp_path), "its tokenizer could not be loaded"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_quietly(config(tmp_path, name))


def test_a_chat_template_comes_from_a_file(tmp_path, model):
    bare = tmp_path / "bare"
    save_llama(bare)
    (bare / "chat_template.jinja").unlink()
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for name in ("train", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", [chat] * 9)
    with pytest.raises(ValueError, match="has no chat template"):
        Session(config(tmp_path, bare, **options("adamw")), None)
    (tmp_path / "t.jinja").write_text(tokenizer().chat_template)
    session = Session(config(tmp_path, bare, {"chat_template": tmp_path / "t.jinja"}, **options("adamw")), None)
    assert session.tokenizer.decode(session.train_rows[0].input_ids).startswith("<|im_start|>user\na<|im_end|>")


def test_a_complement_is_stepped_in_backward_with_attach_release(tmp_path, model):
    more = {"steps": 4, "complement": 1.0, **options("mofasgd")}
    losses = [
        run_quietly(config(tmp_path, model, out=tmp_path / attach, attach=attach, **more))["validation_loss"]
        for attach in ("none", "release")
    ]
    # The same steps: what may round otherwise is the order of a sum.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    with pytest.raises(ValueError, match=r"micro_batch_size=1 sums the gradients.*lower batch_size"):
        run_quietly(config(tmp_path, model, attach="release", micro_batch_size=1, **more))
