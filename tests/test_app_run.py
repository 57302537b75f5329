"""Runs of the application that are interrupted, killed, refused or out of disk: what was reached is never lost."""

import json
import random
import signal
import sys

import pytest
import torch
from app_common import final_weights, metrics, run_quietly, tiny, unfinish, wait_for, write_config
from safetensors import safe_open
from safetensors.torch import load_file

from mofasgd.app import checkpoint
from mofasgd.app.baselines import METHODS
from mofasgd.app.config import ExportConfig
from mofasgd.app.errors import Diverged, Stopped
from mofasgd.app.export import export
from mofasgd.app.trainer import Trainer


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def start(start_process):
    """Return a function that starts `mofasgd pretrain` on a configuration in a process of its own."""

    def start(config, folder, prelude=""):
        path = write_config(config, folder / "config.yaml")
        script = f"{prelude}\nimport sys; from mofasgd.cli import main; sys.exit(main(sys.argv[1:]))"
        return start_process([sys.executable, "-c", script, "pretrain", "--config", str(path)])

    return start


def interrupt_after(monkeypatch, steps):
    """Let the process receive SIGINT in step number `steps`."""
    from mofasgd.app.trainer import Trainer

    original = Trainer.train_step

    def train_step(self):
        if self.step == steps - 1:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, monkeypatch, name):
    optimizer = {"name": name} | ({"rank": 4} if "rank" in METHODS[name].defaults else {})
    if "beta_warmup_steps" in METHODS[name].defaults:
        optimizer["beta_warmup_steps"] = 6
    run_quietly(tiny(tmp_path, optimizer=optimizer, out=tmp_path / "whole"))
    config = tiny(tmp_path, optimizer=optimizer)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(
            Stopped, match=r"SIGINT at step 3: saved. Go on with: mofasgd pretrain --config .*config.yaml"
        ):
            run_quietly(config)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")] == [3]
    config.resume = True
    run_quietly(config)
    assert equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "run"))
    # The interruption adds a log line; what both have is equal, evaluations among it.
    whole, resumed = metrics(tmp_path / "whole"), metrics(tmp_path / "run")
    assert [line for line in resumed if "validation_loss" in line] == [x for x in whole if "validation_loss" in x]
    assert resumed[-2:] == whole[-2:]


def test_the_printed_command_goes_on(tmp_path, start, start_process):
    process = start(tiny(tmp_path, steps=2000, log_every=1), tmp_path)
    wait_for(process, tmp_path / "run", "metrics.jsonl")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.count("\n") == 1
    words = error.split("Go on with: mofasgd ")[1].split()
    assert words[0] == "pretrain"
    done = int(error.split("at step ")[1].split(":")[0])
    process = start_process([sys.executable, "-m", "mofasgd.cli", *words])
    assert process.stdout.readline() == f"resumed at step {done}\n"
    assert int(process.stdout.readline().split()[1]) > done


def test_lines_of_steps_that_are_taken_again_are_dropped(tmp_path):
    run_quietly(tiny(tmp_path, checkpoint_every=4, keep_checkpoints=5))
    whole = metrics(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000008.pt").unlink()
    unfinish(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a kill cut it off
    run_quietly(tiny(tmp_path, resume=True))
    assert metrics(tmp_path / "run") == whole


def test_a_finished_run_stays_as_it_is(tmp_path):
    first = run_quietly(tiny(tmp_path))
    assert run_quietly(tiny(tmp_path, resume=True)) == first
    with pytest.raises(ValueError, match="holds a run already: add --resume true"):
        run_quietly(tiny(tmp_path))


def test_resume_refuses_another_run_and_other_data(tmp_path):
    run_quietly(tiny(tmp_path))
    cases = [
        ({"steps": 9}, "steps=9 was 8 in the run to be resumed"),
        ({"optimizer": {"name": "mofasgd", "rank": 5}}, "optimizer.rank=5 was 4"),
        ({"data": {"context": 8}}, "data.context=8 was 16"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            run_quietly(tiny(tmp_path, resume=True, **options))
    unfinish(tmp_path / "run")
    (tmp_path / "text.txt").write_bytes((tmp_path / "text.txt").read_bytes() + b"!")
    with pytest.raises(ValueError, match="the data is not what the run was started with"):
        run_quietly(tiny(tmp_path, resume=True))


def test_a_kill_between_the_last_checkpoint_and_the_result(tmp_path):
    first = run_quietly(tiny(tmp_path))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    for left in (lines, lines[:-1], []):  # what had reached the disk
        unfinish(tmp_path / "run")
        (tmp_path / "run" / "metrics.jsonl").write_text("".join(left))
        again = run_quietly(tiny(tmp_path, resume=True))
        assert again["validation_loss"] == first["validation_loss"]
        assert again["ms_per_step"] is None


def test_resume_without_a_run_and_with_nothing_saved(tmp_path):
    with pytest.raises(ValueError, match=r"resume=true, but out=.* holds no run"):
        run_quietly(tiny(tmp_path, resume=True))
    assert not (tmp_path / "run").exists()
    run_quietly(tiny(tmp_path, out=tmp_path / "whole", save_last=False))
    assert run_quietly(tiny(tmp_path, out=tmp_path / "whole", save_last=False, resume=True))["ms_per_step"]
    with pytest.raises(ValueError, match="seed=1 was 0"):
        run_quietly(tiny(tmp_path, out=tmp_path / "whole", seed=1, resume=True))
    unfinish(tmp_path / "whole")  # killed before any checkpoint
    run_quietly(tiny(tmp_path, out=tmp_path / "whole", resume=True))
    run_quietly(tiny(tmp_path))
    assert equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "run"))


def test_a_default_that_is_written_out_is_no_other_run(tmp_path):
    run_quietly(tiny(tmp_path, steps=4))
    unfinish(tmp_path / "run")
    optimizer = {"name": "mofasgd", "rank": 4, "lr": METHODS["mofasgd"].defaults["lr"]}
    run_quietly(tiny(tmp_path, steps=4, optimizer=optimizer, resume=True))


def test_one_process_writes_a_folder(tmp_path, start):
    process = start(tiny(tmp_path, steps=100_000, log_every=1), tmp_path)
    wait_for(process, tmp_path / "run", "metrics.jsonl")
    with pytest.raises(ValueError, match="is being written by another process"):
        run_quietly(tiny(tmp_path, steps=100_000, resume=True))


def test_metrics_that_cannot_be_written_cost_no_step(tmp_path, monkeypatch):
    from mofasgd.app.record import JsonLines

    original = JsonLines.write

    def write(self, step, line):
        if step == 6:
            self.file.close()
            self.file = open("/dev/full", "w")  # noqa: SIM115
        original(self, step, line)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "write", write)
        patch.setattr(JsonLines, "sync", lambda self: None)
        with pytest.raises(Stopped, match=r"metrics.jsonl could not be written .*Step 6 is saved.*--resume true"):
            run_quietly(tiny(tmp_path))
    run_quietly(tiny(tmp_path, resume=True))
    run_quietly(tiny(tmp_path, out=tmp_path / "whole"))
    assert equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "run"))


def test_damaged_records_are_named(tmp_path):
    run_quietly(tiny(tmp_path))
    unfinish(tmp_path / "run")
    lines = tmp_path / "run" / "metrics.jsonl"
    whole = lines.read_text()
    lines.write_text(whole.replace('{"step": 2', "garbage", 1))
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged in line 1"):
        run_quietly(tiny(tmp_path, resume=True))
    assert lines.read_text().count("\n") == whole.count("\n")
    (tmp_path / "run" / "run.json").write_text('{"a')
    with pytest.raises(ValueError, match=r"run.json is damaged .*: delete it"):
        run_quietly(tiny(tmp_path, resume=True))


def test_a_checkpoint_holds_the_random_state(tmp_path):
    trainer = Trainer(tiny(tmp_path))
    content = trainer.state() | {"step": 0}
    drawn = torch.rand(3)
    # The second as it was written before there were ranks.
    for states in (content["rng"], content["rng"][0]):
        trainer.restore(content | {"rng": states})
        assert torch.equal(torch.rand(3), drawn)


def test_memory_is_recorded_between_the_steps_that_are_named(tmp_path, monkeypatch):
    seen, steps = [], []
    original = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: steps.append(self.step) or original(self))
    monkeypatch.setattr("mofasgd.app.run.check_recordable", lambda key, device: None)
    monkeypatch.setattr("mofasgd.app.run.start_recording", lambda: seen.append(("start", len(steps))))
    monkeypatch.setattr("mofasgd.app.run.save_recording", lambda path: seen.append((path, len(steps))))
    run_quietly(tiny(tmp_path, memory_history=(2, 5)))
    assert seen == [("start", 2), (tmp_path / "run" / "memory.pickle", 5)]
    # An error within the window: what was recorded is what one wants to see then.
    seen.clear(), steps.clear()
    broken = lambda self: original(self) if self.step < 3 else pytest.fail("out of memory")  # noqa: E731
    monkeypatch.setattr(Trainer, "train_step", broken)
    with pytest.raises(pytest.fail.Exception):
        run_quietly(tiny(tmp_path, memory_history=(2, 5), out=tmp_path / "broken"))
    assert [what for what, _ in seen] == ["start", tmp_path / "broken" / "memory.pickle"]
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"memory_history records allocations of a CUDA device.*on cpu: drop it"):
        run_quietly(tiny(tmp_path, memory_history=(2, 5), out=tmp_path / "other"))
    with pytest.raises(ValueError, match="memory_history=2,9 ends after the last step, steps=8"):
        tiny(tmp_path, memory_history=(2, 9))


def test_out_of_memory_is_one_line(tmp_path):
    config = tiny(tmp_path)
    config.model.vocab_size = 10**13
    with pytest.raises(Stopped, match=r"out of memory: .*Lower micro_batch_size=4"):
        run_quietly(config)


def test_only_the_newest_checkpoints_stay(tmp_path):
    run_quietly(tiny(tmp_path, checkpoint_every=2, keep_checkpoints=2))
    assert [step for step, _ in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")] == [8, 6]
    run_quietly(tiny(tmp_path, out=tmp_path / "light", save_last=False))
    assert checkpoint.checkpoints(tmp_path / "light" / "checkpoints") == []


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_is_told_and_nothing_is_removed(tmp_path, damage):
    run_quietly(tiny(tmp_path, checkpoint_every=6))
    unfinish(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000008.pt"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        weight = final_weights(tmp_path / "run")["head.weight"].numpy().tobytes()
        content[bytes(content).index(weight[:64]) + 10] ^= 1
    path.write_bytes({"truncate": content[: len(content) // 2], "empty": b""}.get(damage, content))
    with pytest.raises(ValueError, match=r"step-00000008.pt is damaged .*: delete it to resume from step 6"):
        run_quietly(tiny(tmp_path, resume=True))
    path.unlink()
    run_quietly(tiny(tmp_path, resume=True))
    run_quietly(tiny(tmp_path, out=tmp_path / "whole"))
    assert equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "run"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, start):
    whole = tiny(tmp_path, out=tmp_path / "whole")
    run_quietly(whole)
    size = (tmp_path / "whole" / "checkpoints" / "step-00000008.pt").stat().st_size
    # Files may grow to the size of a checkpoint less a little, from the second checkpoint on.
    prelude = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from mofasgd.app import checkpoint; save = checkpoint.save\n"
        "def limited(folder, step, *rest):\n"
        f"    if step == 6: resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size}))\n"
        "    return save(folder, step, *rest)\n"
        "checkpoint.save = limited"
    )
    process = start(tiny(tmp_path, checkpoint_every=3), tmp_path, prelude)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.count("\n") == 1
    assert "step 6 could not be saved" in error
    assert "the checkpoint of step 3 is whole" in error
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003.pt"]
    run_quietly(tiny(tmp_path, resume=True))
    assert equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "run"))


def test_weights_are_exported_as_they_are(tmp_path, capsys):
    with pytest.raises(ValueError, match="has no checkpoint: correct --out"):
        export(ExportConfig(out=tmp_path / "run"))
    run_quietly(tiny(tmp_path, precision="bf16-true", checkpoint_every=3))
    export(ExportConfig(out=tmp_path / "run"))
    assert capsys.readouterr().out.endswith("weights of step 8\n")
    path = tmp_path / "run" / "model.safetensors"
    weights = load_file(path)
    assert equal(weights, final_weights(tmp_path / "run"))
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["step"] == "8"
    assert json.loads(about["mofasgd"])["model.width"] == 16


def test_divergence_ends_the_run_and_says_what_to_lower(tmp_path):
    config = tiny(tmp_path, optimizer={"name": "sgd", "lr": 1e30, "max_grad_norm": 0.0})
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) at step \d.*Lower optimizer.lr=1e\+30"):
        run_quietly(config)
    assert not (tmp_path / "run" / "checkpoints").exists()
    # Finite at the log, not at the evaluation after it.
    sudden = {"steps": 1, "warmup": 0.0, "cooldown": 0.0, "out": tmp_path / "sudden"}
    with pytest.raises(Diverged, match="the validation loss is"):
        run_quietly(tiny(tmp_path, optimizer={"name": "sgd", "lr": 1e38, "max_grad_norm": 0.0}, **sudden))
    assert not (tmp_path / "sudden" / "checkpoints").exists()


# The process kills itself: in step number `after`, or with a `share` of checkpoint number `after` on the disk.
KILL_IN_STEP = """
import os, mofasgd.app.trainer as module
step, left = module.Trainer.train_step, [2 * after]
def train_step(self):
    left[0] -= 1
    return step(self) if left[0] else os.kill(os.getpid(), 9)
module.Trainer.train_step = train_step
"""
KILL_IN_SAVE = """
import io, os, torch
save, left = torch.save, [after]
def save_some(content, out):
    left[0] -= 1
    if left[0]:
        return save(content, out)
    whole = io.BytesIO()
    save(content, whole)
    out.write(whole.getvalue()[: int(len(whole.getvalue()) * share)])
    out.flush()
    os.kill(os.getpid(), 9)
torch.save = save_some
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_killed_run_ends_with_the_same_weights(tmp_path, seed, start):
    """SIGKILL up to five times, every second time while a checkpoint is being written."""
    options = {"steps": 60, "checkpoint_every": 2, "log_every": 5, "eval_every": 20}
    run_quietly(tiny(tmp_path, out=tmp_path / "whole", **options))
    chance = random.Random(seed)
    kills = 0
    for attempt in range(10):
        config = tiny(tmp_path, resume=attempt > 0, **options)
        prelude = [KILL_IN_STEP, KILL_IN_SAVE][attempt % 2]
        prelude = f"after, share = {chance.randint(1, 8)}, {chance.random()}\n{prelude}"
        process = start(config, tmp_path, prelude if kills < 5 else "")
        _, error = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
        kills += 1
    assert kills >= 3
    assert equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "run"))
    assert [x for x in metrics(tmp_path / "run") if "validation_loss" in x] == [
        x for x in metrics(tmp_path / "whole") if "validation_loss" in x
    ]
