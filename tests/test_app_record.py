"""What run.json says of a run, field by field, and the time that it is charged with."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import types
from datetime import datetime, timezone

import pytest
import torch
import yaml
from app_common import TEXT, metrics, run_quietly, tiny

from mofasgd.app import record, usage
from mofasgd.app.baselines import METHODS
from mofasgd.app.errors import Stopped
from mofasgd.app.identity import plain
from mofasgd.app.trainer import Trainer
from mofasgd.app.usage import Clock


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves its `now`."""
    clock = types.SimpleNamespace(now=1000.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(usage, "time", clock)
    return clock


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Let a git repository of a single file be the package; return its folder and a function that calls git there."""
    # Not that of a hook that runs these tests, and without its owner's settings.
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    folder = tmp_path / "package"
    folder.mkdir()

    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        done = subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    (folder / "__init__.py").write_text("first = True\n")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(record, "PACKAGE", folder)
    return folder, git


def test_the_record_of_a_run_that_was_resumed_once(tmp_path, monkeypatch, clock, repository):
    package, git = repository
    # Seconds of each step; the first of a session is slow. All else takes time as well, which is not the training's.
    seconds = [50, 1, 2, 3, 4, 70, 5, 6, 7, 8, 9, 1]
    losses = {4: 2.5, 8: 5.0, 12: 3.0}
    step, state, started = Trainer.train_step, Trainer.state, []

    def train_step(self):
        clock.now += seconds[self.step]
        if self.step == 4 and not self.config.resume:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    def slow(work):
        def slowed(*arguments, **options):
            clock.now += 10_000
            return work(*arguments, **options)

        return slowed

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(Trainer, "evaluate", slow(lambda self: losses[self.step]))
    monkeypatch.setattr(Trainer, "state", slow(state))
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    wandb = types.SimpleNamespace(init=slow(lambda **options: started.append(options) or run))
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def config(**options):
        optimizer, data = {"name": "muon", "lr": 0.01}, {"holdout": 0.25}
        often = {"steps": 12, "log_every": 3, "eval_every": 4, "checkpoint_every": 10}
        return tiny(tmp_path, optimizer=optimizer, data=data, wandb="project", seed=3, **often, **options)

    def written():
        return json.loads((tmp_path / "run" / "run.json").read_text())

    with pytest.raises(Stopped, match="SIGINT at step 5"):
        run_quietly(config())
    first = written()
    assert "result" not in first
    (package / "__init__.py").write_text("second = True\n")
    result = run_quietly(config(resume=True))
    found = written()

    # W&B goes on with the curves of an id.
    assert re.fullmatch("[0-9a-f]{16}", found["id"])
    assert [(run["id"], run["resume"]) for run in started] == [(found["id"], "allow")] * 2
    assert first["id"] == found.pop("id")
    assert found.pop("config") == plain(config(resume=True))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == plain(config())
    settings = METHODS["muon"].defaults | {"lr": 0.01, "betas": [0.9, 0.95]}
    assert found.pop("optimizer_settings") == settings
    # All that decides the result, and nothing else.
    decides = found.pop("identity")
    assert decides == first["identity"]
    assert {key: value for key, value in decides.items() if key.startswith("optimizer.")} == {
        "optimizer.name": "muon",
        **{f"optimizer.{key}": value for key, value in settings.items()},
    }
    assert {"steps": 12, "seed": 3, "data.holdout": 0.25, "model.width": 16}.items() <= decides.items()
    assert decides.keys().isdisjoint({"out", "resume", "log_every", "wandb", "data.train"})
    assert set(found.pop("seeds").values()) == {3}
    data = found.pop("data")
    assert data == first["data"]
    assert re.fullmatch("[0-9a-f]{64}", data.pop("sha256"))
    held = round(len(TEXT) / 4)
    assert data == {"training_tokens": len(TEXT) - held, "validation_tokens": held}
    # Four matrices of attention, two of the MLP; embedding and head.
    blocks, ends = 4 * 16 * 16 + 2 * 16 * 64, 2 * 256 * 16
    assert found.pop("model") == {"parameters": blocks + ends, "megabytes": 4 * (blocks + ends) / 1e6, "vocab": 256}

    sessions = found.pop("sessions")
    assert sessions[:1] == first["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 5]
    assert [session["dirty"] for session in sessions] == [False, True]
    assert len({session["source"] for session in sessions}) == 2
    for session in sessions:
        assert session["git"] == git("rev-parse", "HEAD")
        assert session["ranks"] == 1
        assert session["python"] == platform.python_version()
        assert session["versions"]["torch"].startswith(torch.__version__.split("+")[0])
        assert session["cuda"] == torch.version.cuda
        assert session["device"].startswith("cpu: ")
        assert (session["cpus"], session["threads"]) == (os.cpu_count(), torch.get_num_threads())
        assert session["system"] == platform.platform()
        assert session["command"].split()[0] == os.path.basename(sys.argv[0])
        assert 0 <= (datetime.now(timezone.utc) - datetime.fromisoformat(session["time"])).total_seconds() < 600
    assert len(sessions) == 2

    assert found.pop("result") == result
    assert result.pop("peak_mb") > 4 * (blocks + ends) / 1e6
    assert result == {
        "validation_loss": 3.0,
        "best_validation_loss": 2.5,
        "tokens": 12 * 4 * 16,
        # Muon's momentum; two moments of AdamW each for embedding and head.
        "optimizer_state_mb": round(4 * (blocks + 2 * ends) / 1e6, 3),
        "gradients_mb": round(4 * (blocks + ends) / 1e6, 3),
        "seconds": sum(seconds),
        # Of the second session, which logs at step 6 for the first time.
        "ms_per_step": 1000 * sum(seconds[6:]) / 6,
    }
    assert not found
    lines = [(line["step"], line["validation_loss"]) for line in metrics(tmp_path / "run") if "validation_loss" in line]
    assert lines == list(losses.items())


def test_the_commit_is_the_packages_own(repository):
    folder, git = repository

    def found():
        return [record.environment(torch.device("cpu"))[key] for key in ("git", "dirty")]

    assert found() == [git("rev-parse", "HEAD"), False]
    (folder / "notes.txt").write_text("of somebody's\n")
    assert found() == [git("rev-parse", "HEAD"), False]
    # Installed in somebody's repository, which knows nothing of it.
    git("rm", "--cached", "__init__.py")
    git("commit", "--allow-empty", "-m", "second")
    assert found() == [None, None]


def test_the_first_interval_warms_up(clock):
    times = Clock(100.0)
    assert times.per_step() is None
    clock.now += 50
    assert times.lap(1) == 50
    assert times.per_step() == 50
    clock.now += 2
    assert times.lap(2) == 1
    clock.now += 1000
    times.skip()
    clock.now += 10
    assert times.lap(1) == 10
    assert times.per_step() == 4
    assert times.seconds == 162
