"""`mofasgd compare`: which runs, which of them is reported, and what is drawn and said."""

import json
import math

import pytest
from app_common import metrics, run_quietly, tiny

from mofasgd.app.compare import compare
from mofasgd.app.config import CompareConfig, OptimizerConfig
from mofasgd.app.errors import Stopped
from mofasgd.app.record import TensorBoard, WandB
from mofasgd.app.report import reading


def comparison(folder, **options):
    base = tiny(folder, steps=4, save_last=False)
    methods = {
        "ours r4": OptimizerConfig(name="mofasgd", rank=4),
        "AdamW": OptimizerConfig(name="adamw", lr=0.01),
        "wild": OptimizerConfig(name="sgd", lr=1e30, max_grad_norm=0.0),
    }
    defaults = {"base": base, "methods": methods, "lrs": {"ours r4": [0.001, 0.03, 0.06]}, "seeds": [0, 1]}
    return CompareConfig(out=folder / "out", **(defaults | options))


def test_the_best_rate_is_repeated_and_reported(tmp_path, capsys):
    compare(comparison(tmp_path))
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    ours = [run for run in results["runs"] if run["label"] == "ours r4"]
    best = min((run for run in ours if run["seed"] == 0), key=lambda run: run["validation_loss"])
    assert sorted((run["lr"], run["seed"]) for run in ours) == sorted(
        [(0.001, 0), (0.03, 0), (0.06, 0), (best["lr"], 1)]
    )
    rows = {row["label"]: row for row in results["rows"]}
    repeated = [run["validation_loss"] for run in ours if run["lr"] == best["lr"]]
    assert rows["ours r4"]["validation_loss"] == pytest.approx(sum(repeated) / 2)
    assert rows["ours r4"]["std"] == pytest.approx(abs(repeated[0] - repeated[1]) / math.sqrt(2))
    assert rows["ours r4"]["edge"] == (best["lr"] in (0.001, 0.06))
    assert rows["wild"]["validation_loss"] is None
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000
    for text in ("ours r4", "diverged", results["reading"]):
        assert text in shown.replace("\n", " ") or text in shown
    # One of the runs alone gives the same loss.
    alone = tiny(tmp_path, steps=4, optimizer={"name": "mofasgd", "rank": 4, "lr": best["lr"]})
    assert run_quietly(alone)["validation_loss"] == best["validation_loss"]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "out" / best["folder"])


def test_a_second_call_keeps_what_is_there_and_other_settings_are_refused(tmp_path, monkeypatch):
    import mofasgd.app.compare as module

    compare(comparison(tmp_path))
    before = json.loads((tmp_path / "out" / "results.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", lambda *_: pytest.fail("a finished run was repeated"))
        compare(comparison(tmp_path))
    after = json.loads((tmp_path / "out" / "results.json").read_text())
    assert after["rows"] == before["rows"]
    with pytest.raises(ValueError, match=r"holds a run of 'ours r4' at lr 0\.001 with other settings"):
        compare(comparison(tmp_path, base=tiny(tmp_path, steps=5)))


def test_processes_give_the_same_losses(tmp_path):
    compare(comparison(tmp_path, seeds=[0]))
    parallel = comparison(tmp_path, seeds=[0], jobs=2)
    parallel.out = tmp_path / "out2"
    compare(parallel)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "out2"))
    losses = [{run["folder"]: str(run["validation_loss"]) for run in result["runs"]} for result in (one, two)]
    assert losses[0] == losses[1]


def row(label, method, loss, state):
    return {"label": label, "method": method, "validation_loss": loss, "optimizer_state_mb": state}


def test_the_reading_is_as_honest_as_the_numbers():
    rows = [row("AdamW", "adamw", 2.0, 10.0), row("M", "mofasgd", 2.25, 1.0), row("X", "muon", 1.5, 5.0)]
    assert reading(rows) == (
        "X ends lowest at 1.500; AdamW at 2.000 with 10.00 MB of state; M 0.250 above AdamW with 10% of its state."
    )
    assert "M 0.500 below AdamW" in reading([rows[0], row("M", "mofasgd", 1.5, 1.0)])
    assert reading([row("AdamW", "adamw", None, None)]) == "Every run diverged."


def test_missing_loggers_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        WandB("project", tmp_path, "id", {})
    with pytest.raises(ValueError, match="pip install tensorboard"):
        TensorBoard(tmp_path, 0)


def test_loggers_receive_the_metrics(tmp_path, monkeypatch):
    import sys
    import types

    calls = []
    run = types.SimpleNamespace(log=lambda m, step: calls.append((step, m)), finish=lambda: calls.append("finish"))
    wandb = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    scalars = []
    writer = types.SimpleNamespace(add_scalar=lambda *a: scalars.append(a), close=lambda: scalars.append("close"))
    board = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: scalars.append(purge_step) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    run_quietly(tiny(tmp_path, wandb="project", tensorboard=True))
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert calls[0]["project"] == "project"
    assert [{"step": step, **m} for step, m in calls[1:-1]] == written
    assert calls[-1] == "finish"
    assert scalars[0] == 1
    assert len(scalars) == 2 + sum(len(line) - 1 for line in written)


def test_a_failed_run_does_not_cost_the_others(tmp_path):
    # The folder of one run is in the way as a file.
    config = comparison(tmp_path, seeds=[0], jobs=2)
    (tmp_path / "out").mkdir()
    obstacle = tmp_path / "out" / "AdamW-lr0.01-seed0"
    obstacle.write_text("")
    with pytest.raises(Stopped, match=r"1 of 5 runs failed, the first: AdamW, lr 0\.01, seed 0: .*Error"):
        compare(config)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert sorted(run["label"] for run in results["runs"]) == ["ours r4"] * 3 + ["wild"]
    obstacle.unlink()
    compare(config)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 5
