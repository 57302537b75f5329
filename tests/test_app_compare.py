"""`mofasgd compare`: which runs, which of them is reported, and what is drawn and said."""

import dataclasses
import json
import math

import pytest
from app_common import metrics, run_quietly, tiny

from mofasgd.app.compare import check_same_data, compare
from mofasgd.app.config import CompareConfig, OptimizerConfig, PretrainConfig
from mofasgd.app.errors import Stopped
from mofasgd.app.identity import digest
from mofasgd.app.record import TensorBoard, WandB
from mofasgd.app.report import reading


def neutral(config):
    return dataclasses.replace(config, out=PretrainConfig().out, optimizer=OptimizerConfig())


def comparison(folder, **options):
    base = neutral(tiny(folder, steps=4, save_last=False))
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


def test_a_best_rate_at_either_end_of_those_tried_is_marked(tmp_path, monkeypatch, capsys):
    import mofasgd.app.compare as module

    # Not in order: an end is the lowest or the highest.
    rates = [0.02, 0.01, 0.03]
    losses = {"low": [2, 1, 3], "middle": [1, 2, 3], "high": [2, 3, 1], "single": [1]}
    costs = dict.fromkeys(("optimizer_state_mb", "gradients_mb", "weights_mb", "ms_per_step"), 1.0)

    def execute(job, workers):
        loss = float(losses[job.label][rates.index(job.lr)])
        told = {"label": job.label, "lr": job.lr, "seed": job.seed, "config": digest(job.config), "jobs": workers}
        return {**told, **costs, "folder": "none", "data": {"sha256": ""}, "validation_loss": loss}

    monkeypatch.setattr(module, "_execute", execute)
    monkeypatch.setattr(module, "draw", lambda *_: False)
    methods = {label: OptimizerConfig(name="adamw") for label in losses}
    compare(comparison(tmp_path, methods=methods, lrs={label: rates[: len(losses[label])] for label in losses}))
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {row["label"]: (row["lr"], row["edge"]) for row in rows} == {
        "low": (0.01, True),
        "middle": (0.02, False),
        "high": (0.03, True),
        "single": (0.02, False),
    }
    shown = capsys.readouterr().out
    assert [text in shown for text in ("0.01*", "0.02*", "0.03*", "at the end of the learning rates")] == [1, 0, 1, 1]


def test_a_second_call_keeps_what_is_there_and_other_settings_are_refused(tmp_path, monkeypatch):
    import mofasgd.app.compare as module

    compare(comparison(tmp_path))
    before = json.loads((tmp_path / "out" / "results.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", lambda *_: pytest.fail("a finished run was repeated"))
        compare(comparison(tmp_path))
    after = json.loads((tmp_path / "out" / "results.json").read_text())
    assert after["rows"] == before["rows"]
    # Other settings make other runs; nothing of the old ones is reported.
    config = comparison(tmp_path, base=neutral(tiny(tmp_path, steps=3, save_last=False)), seeds=[0])
    config.lrs = {"ours r4": [0.01]}
    compare(config)
    (ours,) = (
        r for r in json.loads((tmp_path / "out" / "results.json").read_text())["rows"] if r["label"] == "ours r4"
    )
    alone = tiny(tmp_path, steps=3, optimizer={"name": "mofasgd", "rank": 4, "lr": 0.01})
    assert (ours["lr"], ours["edge"]) == (0.01, False)
    assert ours["validation_loss"] == run_quietly(alone)["validation_loss"]


def test_all_runs_have_the_same_data(tmp_path, monkeypatch):
    import mofasgd.app.compare as module

    config = comparison(tmp_path, seeds=[0])
    compare(config)
    results, text = tmp_path / "out" / "results.json", tmp_path / "text.txt"
    before = results.read_text()
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("a run was made, or repeated"))
    # The same content at another place is the same data; other content in another file is not, nor is no file.
    moved = text.rename(tmp_path / "moved.txt")
    config.base.data.train = [str(moved)]
    compare(config)
    assert json.loads(results.read_text())["rows"] == json.loads(before)["rows"]
    before = results.read_text()
    other = tmp_path / "other.txt"
    other.write_bytes(moved.read_bytes()[:-20])
    for methods in (config.methods, config.methods | {"Muon": OptimizerConfig(name="muon")}):
        for name, message in (("other", "the data is not that of 'ours r4' in .*results.json"), ("no", "no such file")):
            changed = dataclasses.replace(config, methods=methods)
            changed.base = dataclasses.replace(config.base)
            changed.base.data = dataclasses.replace(config.base.data, train=[str(tmp_path / f"{name}.txt")])
            with pytest.raises(ValueError, match=message):
                compare(changed)
    assert results.read_text() == before


def test_data_that_changes_between_the_runs_is_seen():
    runs = [{"label": label, "data": {"sha256": label[0]}} for label in ("a", "a2", "b")]
    check_same_data(runs[:2])
    with pytest.raises(ValueError, match="the data changed between the runs of 'a2' and 'b'"):
        check_same_data(runs)


def test_labels_that_look_alike_have_folders_of_their_own(tmp_path):
    methods = {
        "c = 1": OptimizerConfig(name="adamw"),
        "c=1": OptimizerConfig(name="muon"),
        "β": OptimizerConfig(name="adam"),
    }
    compare(comparison(tmp_path, methods=methods, lrs={label: [0.01] for label in methods}, seeds=[0]))
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert len({run["folder"] for run in runs}) == 3


def test_processes_give_the_same_losses(tmp_path):
    compare(comparison(tmp_path, seeds=[0]))
    parallel = comparison(tmp_path, seeds=[0], jobs=2)
    parallel.out = tmp_path / "out2"
    compare(parallel)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "out2"))
    losses = [{run["folder"]: str(run["validation_loss"]) for run in result["runs"]} for result in (one, two)]
    assert losses[0] == losses[1]
    assert [[row["ms_per_step"] is None for row in result["rows"]] for result in (one, two)] == [
        [False, False, True],
        [True] * 3,
    ]


def row(label, method, loss, state):
    return {"label": label, "method": method, "validation_loss": loss, "optimizer_state_mb": state}


def test_the_reading_is_as_honest_as_the_numbers():
    rows = [row("AdamW", "adamw", 2.0, 10.0), row("M", "mofasgd", 2.25, 1.0), row("X", "muon", 1.5, 5.0)]
    assert reading(rows) == (
        "X ends lowest at 1.500; AdamW at 2.000 with 10.00 MB of state; M 0.250 above AdamW with 10% of its state."
    )
    assert "AdamW diverged" in reading([rows[1], row("AdamW", "adamw", None, None)])
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
    import mofasgd.app.compare as module

    config = comparison(tmp_path, seeds=[0], jobs=2)
    (tmp_path / "out").mkdir()
    obstacle = module._job(config, "AdamW", 0.01, 0).config.out
    obstacle.write_text("")
    with pytest.raises(Stopped, match=r"1 of 5 runs failed, the first: AdamW, lr 0\.01, seed 0: .*Error"):
        compare(config)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert sorted(run["label"] for run in results["runs"]) == ["ours r4"] * 3 + ["wild"]
    obstacle.unlink()
    compare(config)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 5
