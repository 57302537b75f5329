"""`benchmarks/tables.py`: which run comes next, and what becomes of failed ones."""

import math
from pathlib import Path

import pytest

pytest.importorskip("trl")

from mofasgd.app.tune.config import MethodConfig
from mofasgd.app.tune.grid import Execute, Grid, Spec, read_json

ROOT = Path(__file__).resolve().parents[1]
START = (0.001, 0.01, 0.1)


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tables

    return tables


def loss(run):
    """Lowest at a rate of 0.3, beyond the end of START; "muon" at 0.02, within; "lora" diverges."""
    name, lr, seed = run
    best = {"adamw": 0.3, "muon": 0.02}.get(name)
    return {"loss": None if best is None else abs(math.log(lr / best)) + seed / 100, "data": "same"}


def plan(tables, folder, method="adamw", rates=START):
    cells = [Spec("t", method, {lr: MethodConfig(method=method, lr=lr) for lr in rates})]
    options = {"score": "loss", "highest": False, "identity": lambda run: {}}
    grid = Grid(folder, cells, [0, 1], 0, make=lambda c, m, seed: (m.method, m.lr, seed), **options)
    return tables.Plan(grid, loss, 4)


def drain(found):
    """Make the runs one at a time, lowest stage first, and return them."""
    made = []
    while rest := sorted(found.missing(), key=lambda entry: entry[0]):
        job = rest[0][1]
        found.grid.keep(Execute(loss, 1)(job))
        made.append((job.lr, job.seed))
    return made


@pytest.mark.parametrize(
    ("method", "rates", "made"),
    [
        ("adamw", START, [(0.01, 0), (0.001, 0), (0.1, 0), (1.0, 0), (0.1, 1)]),
        ("muon", START, [(0.01, 0), (0.001, 0), (0.1, 0), (0.032, 0), (0.032, 1)]),
        ("lora", START, [(0.01, 0), (0.001, 0), (0.1, 0), (0.0001, 0)]),
        ("adamw", (0.01,), [(0.01, 0), (0.01, 1)]),
        ("muon", (0.02, 0.0201, 0.0202), [(0.0201, 0), (0.02, 0), (0.0202, 0), (0.02, 1)]),
    ],
)
def test_the_middle_rate_comes_first_and_the_best_is_bracketed(tables, tmp_path, method, rates, made):
    assert drain(plan(tables, tmp_path, method, rates)) == made
    assert list(plan(tables, tmp_path, method, rates).missing()) == []


def test_a_report_of_half_a_table_marks_the_rates_that_it_has(tables, tmp_path):
    found = plan(tables, tmp_path)
    for _, job in list(found.missing())[:2]:
        found.grid.keep(Execute(loss, 1)(job))
    found.report()
    (cell,) = read_json(tmp_path / "results.json")["cells"]
    assert (cell["lr"], cell["edge"], cell["seeds"]) == (0.01, True, 1)


class Answers:
    """A worker that answers at once; `refuse` of the runs fail."""

    gpu, task = "0", None

    def __init__(self, refuse):
        self.pipe, self.process, self.refuse, self.starts = self, self, refuse, 0

    def send(self, message):
        self.execute, self.job = message

    def answer(self):
        self.refuse -= 1
        return "no memory" if self.refuse >= 0 else self.execute(self.job)

    def start(self):
        self.starts += 1

    def kill(self):
        pass


@pytest.mark.parametrize(("refuse", "runs"), [(1, 5), (2, 2)])
def test_a_failed_run_is_made_again_once(tables, tmp_path, monkeypatch, refuse, runs):
    monkeypatch.setattr(tables, "wait", lambda pipes, timeout: pipes)
    worker, found = Answers(refuse), plan(tables, tmp_path)
    tables.Schedule([found], [worker], math.inf, 3).run()
    kept = read_json(tmp_path / "results.json")["runs"]
    assert worker.starts == refuse
    # Without one of its first rates a method is neither extended nor repeated.
    assert len(kept) == runs
    assert {run["jobs"] for run in kept} == {3}


def test_what_would_not_end_in_time_is_not_begun(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables.time, "monotonic", lambda: 0.0)
    found = plan(tables, tmp_path)
    first = next(job for _, job in found.missing())
    found.grid.keep({**Execute(loss, 1)(first), "wall_seconds": 30.0})
    choose = tables.Schedule([found], [], 29.0, 1)._next, tables.Schedule([found], [], 31.0, 1)._next
    assert choose[0]("0") is None
    assert choose[1]("0")[1].lr == 0.01


def test_muon_has_a_gpu_to_itself(tables, tmp_path):
    found, workers = plan(tables, tmp_path, "adamw"), [Answers(0), Answers(0)]
    found.grid.specs += plan(tables, tmp_path, "muon").grid.specs
    schedule = tables.Schedule([found], workers, math.inf, 2)
    plain, muon = (next(job for _, job in found.missing() if job.spec.label == label) for label in ("adamw", "muon"))
    assert schedule._next("0")[1].spec.label == "muon"
    workers[1].task = tables.Task(found, plain, 0.0)
    assert schedule._next("0")[1].spec.label == "adamw"
    assert schedule._next("1")[1].spec.label == "muon"
    workers[1].task = tables.Task(found, muon, 0.0)
    assert schedule._next("0") is None


def test_the_rows_of_a_process_are_read_once_and_what_is_left_out_told_each_time(tables, tmp_path):
    from tune_case import tokenizer

    from mofasgd.app.tune.config import RowsConfig
    from mofasgd.app.tune.rows import Skipped

    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n{"question": "c", "answer": "d"}\n')
    read = tables.finetune_table.rows_of
    config, counted = RowsConfig(train=str(path), holdout=0.5), (Skipped(), Skipped())
    (train, held_out), again = (read(tokenizer(), config, skipped) for skipped in counted)
    assert again[0] is train
    assert again[1] is held_out
    assert [str(skipped)[:15] for skipped in counted] == ["1 rows left out"] * 2
    assert read(tokenizer(), RowsConfig(train=str(path), holdout=0.5, rows=1), Skipped())[0] is not train
