"""`mofasgd glue`: metrics, rows, and which runs are made and reported."""

import json
import math
import random
from fractions import Fraction

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tune_case import save_bert, tokenizer, write_rows

from mofasgd.app.errors import Stopped
from mofasgd.app.tune.config import GlueConfig, MethodConfig
from mofasgd.app.tune.glue import Run as GlueRun
from mofasgd.app.tune.glue import execute, glue, predict, specs
from mofasgd.app.tune.grid import Grid, Spec, markdown
from mofasgd.app.tune.metrics import METRICS, ranks, scores
from mofasgd.app.tune.rows import Skipped
from mofasgd.app.tune.tasks import TASKS, encode, load, names

# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_classes_against_counts():
    drawn = random.Random(0)
    predicted, labels = ([drawn.randrange(2) for _ in range(37)] for _ in range(2))
    pairs = list(zip(predicted, labels, strict=True))
    tp, fp, fn, tn = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
    found = {
        name: METRICS[name](torch.tensor(predicted), torch.tensor(labels)) for name in ("accuracy", "f1", "matthews")
    }
    assert found["accuracy"] == pytest.approx((tp + tn) / 37)
    precision, recall = Fraction(tp, tp + fp), Fraction(tp, tp + fn)
    assert found["f1"] == pytest.approx(float(2 * precision * recall / (precision + recall)))
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / math.sqrt(margins))


def test_correlations_against_sums_over_pairs():
    """Pearson's as a mean over all pairs of rows, Spearman's by counting smaller and equal values."""
    drawn = random.Random(1)
    x, y = [drawn.choice([0.5, 1.0, 2.5, 7.0]) for _ in range(23)], [drawn.random() for _ in range(23)]

    def by_pairs(a, b):
        def covariance(p, q):
            return sum((p[i] - p[j]) * (q[i] - q[j]) for i in range(23) for j in range(23))

        return covariance(a, b) / math.sqrt(covariance(a, a) * covariance(b, b))

    def place(a):
        return [sum(v < value for v in a) + (sum(v == value for v in a) + 1) / 2 for value in a]

    assert METRICS["pearson"](torch.tensor(x), torch.tensor(y)) == pytest.approx(by_pairs(x, y), abs=1e-6)
    assert ranks(torch.tensor(x)).tolist() == place(x)
    assert METRICS["spearman"](torch.tensor(x), torch.tensor(y)) == pytest.approx(
        by_pairs(place(x), place(y)), abs=1e-6
    )


def test_metrics_are_zero_where_they_are_undefined():
    zeros, labels = torch.zeros(4), torch.tensor([0, 1, 0, 1])
    assert [METRICS[name](zeros, labels) for name in ("matthews", "pearson", "spearman", "f1")] == [0.0] * 4
    assert scores(("accuracy", "f1"), torch.eye(2)[[1, 1, 0, 1]], labels)["score"] == pytest.approx(
        100 * (0.75 + 0.8) / 2
    )


# --- rows ------------------------------------------------------------------------------------------------------------


def folder_of(path, name="rte", count=24, two=True):
    """Rows whose class is the first letter of the text, in GLUE's folder form."""
    (path / name).mkdir(parents=True)
    rows = [{"s1": f"{'ab'[i % 2]} {i}", "s2": "c", "label": i % 2} for i in range(count)]
    rows = rows if two else [{"s1": row["s1"], "label": row["label"]} for row in rows]
    write_rows(path / name / "train8k.jsonl", rows)
    write_rows(path / name / "dev_heldout.jsonl", rows[:9])
    return path


def test_malformed_rows_are_counted(tmp_path):
    folder_of(tmp_path)
    good = {"s1": "a", "s2": "b", "label": 1}
    bad = [3, {**good, "s2": " "}, {**good, "label": -1}, {**good, "label": "1"}, {**good, "label": True}]
    write_rows(tmp_path / "rte" / "train8k.jsonl", [good, *bad])
    skipped = Skipped()
    train, _ = load(str(tmp_path), "rte", skipped)
    assert [(row.texts, row.label) for row in train] == [(("a", "b"), 1)]
    assert skipped.counts == {
        "that is no JSON object": 1,
        "without text in s1 and s2": 1,
        "whose label is not in 0..1": 3,
    }
    write_rows(tmp_path / "rte" / "train8k.jsonl", bad)
    with pytest.raises(ValueError, match=r"has no usable row: .*5 rows left out"):
        load(str(tmp_path), "rte", Skipped())
    write_rows(tmp_path / "rte" / "train9k.jsonl", [good])
    with pytest.raises(ValueError, match=r"should be one file, found train8k\.jsonl, train9k\.jsonl"):
        load(str(tmp_path), "rte", Skipped())
    with pytest.raises(ValueError, match=r"cola/train\*\.jsonl should be one file, found none"):
        load(str(tmp_path), "cola", Skipped())


def test_the_hub_has_other_columns_and_splits(monkeypatch):
    asked = []

    def load_dataset(name, part, split):
        asked.append((name, part, split))
        return [{"premise": "a", "hypothesis": "b", "label": 2}, {"premise": "a", "hypothesis": "b", "label": -1}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    train, dev = load("org/glue", "mnli", Skipped())
    assert asked == [("org/glue", "mnli", "train"), ("org/glue", "mnli", "validation_matched")]
    assert [row.label for row in train + dev] == [2, 2]


def test_long_rows_are_cut_and_counted(tmp_path):
    rows, _ = load(str(folder_of(tmp_path, count=12)), "rte", Skipped())
    encoded, cut = encode(tokenizer(None), rows, 4)
    assert cut == 2  # "a 10c" and "b 11c"
    assert max(len(row["input_ids"]) for row in encoded) == 4


def test_tasks_are_named():
    assert names("all") == list(TASKS)
    assert names("rte, cola") == ["rte", "cola"]
    for wrong, message in [("rtee", "did you mean 'rte'"), ("rte,rte", "names a task twice")]:
        with pytest.raises(ValueError, match=message):
            names(wrong)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


def test_outputs_come_in_the_order_of_the_rows(tmp_path, model):
    import contextlib

    from transformers import AutoModelForSequenceClassification

    net = AutoModelForSequenceClassification.from_pretrained(model)
    tok = tokenizer(None)
    rows = [{**tok("x" * n), "labels": 0} for n in (3, 9, 1, 5)]
    found = predict(net, tok, rows, contextlib.nullcontext)
    net.eval()
    for row, output in zip(rows, found, strict=True):
        assert torch.allclose(net(torch.tensor([row["input_ids"]])).logits[0], output, atol=1e-6)


@pytest.mark.parametrize("method", ["mofasgd", "adamw", "lora", "galore", "muon"])
def test_every_method_learns_the_first_letter(tmp_path, model, method):
    ranked = {"rank": 4} if method in ("mofasgd", "galore", "lora") else {}
    split = {"adamw_lr": 0.01} if method in ("mofasgd", "galore", "muon") else {}
    settings = MethodConfig(method=method, lr=0.03 if method == "mofasgd" else 0.01, **ranked, **split)
    config = GlueConfig(
        model=str(model), data=str(folder_of(tmp_path)), out=tmp_path, epochs=10, batch_size=8, device="cpu"
    )
    result = execute(GlueRun(config, "rte", settings, 0))
    assert result["score"] == 100.0
    assert result["steps"] == 30
    # With adapters the new head is trained as well.
    assert (result["model"]["trainable_parameters"] < result["model"]["parameters"]) == (method == "lora")
    assert result["model"]["trainable_parameters"] > 66


def test_a_number_is_predicted_and_a_diverged_run_has_no_score(tmp_path, model):
    folder_of(tmp_path, "stsb")
    lengths = {"context": 3, "epochs": 10, "batch_size": 8, "log_every": 1}
    config = GlueConfig(model=str(model), data=str(tmp_path), out=tmp_path, device="cpu", **lengths)
    result = execute(GlueRun(config, "stsb", MethodConfig(method="adamw", lr=0.01), 0))
    # All rows have four tokens or more, of which three tell what is learned.
    assert (result["rows"], result["cut"]) == ([24, 9], 24 + 9)
    assert result["pearson"] > 0.9
    assert result["score"] == pytest.approx(50 * (result["pearson"] + result["spearman"]))
    assert execute(GlueRun(config, "stsb", MethodConfig(method="adamw", lr=1e30), 0))["score"] is None


def test_the_command_makes_a_table_and_goes_on(tmp_path, model, capsys):
    keys = {"model": str(model), "data": str(folder_of(tmp_path / "data")), "out": tmp_path / "out", "device": "cpu"}
    methods = {"ours": MethodConfig(rank=4, lr=0.03, adamw_lr=0.01), "AdamW": MethodConfig(method="adamw", lr=0.01)}
    config = GlueConfig(**keys, methods=methods, seeds=[3, 4], steps=2, profile_memory=1, rows={"rte": 20})
    glue(config)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(run["label"], run["seed"]) for run in results["runs"]] == [
        ("ours", 3),
        ("AdamW", 3),
        ("ours", 4),
        ("AdamW", 4),
    ]
    assert [run["rows"] for run in results["runs"]] == [[20, 9]] * 4
    assert len({run["data"] for run in results["runs"]}) == 1
    assert (tmp_path / "out" / "table.md").read_text().startswith("|  | rte | state MB |")
    assert len(list((tmp_path / "out").glob("memory-*/memory.png"))) == 4
    capsys.readouterr()
    glue(config)
    assert "has 2 of 2 runs already" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 4


def test_a_wrong_table_is_refused():
    for keys, message in [
        ({"lrs": {"x": [1.0]}}, "lrs has the label 'x', which methods does not: mofasgd"),
        ({"lrs": {"mofasgd": [1.0, 1.0]}}, "names a rate twice"),
        ({"methods": {"a": MethodConfig()}, "rank": 3}, "no effect beside methods"),
        ({"methods": {"a": MethodConfig(method="adamw", rank=3)}}, "rank=3 does not apply to adamw"),
        ({"lrs": {"mofasgd": [-1.0]}}, "lr=-1.0"),
        ({"rows": {"sst": 3}}, "rows='sst' is unknown; did you mean 'sst2'"),
    ]:
        with pytest.raises(ValueError, match=message):
            specs(GlueConfig(**keys))


# --- the grid --------------------------------------------------------------------------------------------------------

# By method, rate and seed.
SCORES = {("adamw", 1.0, 0): 3.0, ("adamw", 2.0, 0): 5.0, ("adamw", 1.0, 1): 4.0, ("adamw", 2.0, 1): 7.0}
SCORES |= {("muon", 1.0, 0): None, ("muon", 2.0, 0): 1.0, ("muon", 2.0, 1): 2.0}


def fake(run):
    label, lr, seed = run
    costs = {"optimizer_state_mb": 1.0, "peak_mb": 2.0, "tokens_per_second": 3.0}
    return {"score": SCORES[(label, lr, seed)], "data": "same", **costs}


def grid(folder, highest=True, workers=1):
    cells = [Spec("t", c, {lr: MethodConfig(method=c, lr=lr) for lr in (1.0, 2.0)}) for c in ("adamw", "muon")]
    return Grid(
        folder,
        cells,
        [0, 1],
        workers,
        score="score",
        highest=highest,
        make=lambda column, method, seed: (method.method, method.lr, seed),
        identity=lambda run: {},
    )


def test_the_best_rate_is_repeated_and_a_diverged_one_is_the_worst(tmp_path):
    first, second = grid(tmp_path).run(fake)
    assert (first["lr"], first["mean"], first["std"], first["edge"]) == (2.0, 6.0, pytest.approx(math.sqrt(2)), True)
    assert (second["lr"], second["mean"], second["seeds"]) == (2.0, 1.5, 2)
    lower = grid(tmp_path / "low", highest=False)
    (tmp_path / "low").mkdir()
    assert [(cell["lr"], cell["mean"]) for cell in lower.run(fake)] == [(1.0, 3.5), (2.0, 1.5)]


def test_a_failed_grid_goes_on_where_it_ended(tmp_path):
    made = []

    def failing(run):
        if len(made) == 2:
            raise Stopped("no power.")
        made.append(run)
        return fake(run)

    with pytest.raises(Stopped, match=r"no power\. The same call again"):
        grid(tmp_path).run(failing)
    later = []
    grid(tmp_path).run(lambda run: later.append(run) or fake(run))
    assert made == [("adamw", 1.0, 0), ("adamw", 2.0, 0)]
    assert later == [("muon", 1.0, 0), ("muon", 2.0, 0), ("adamw", 2.0, 1), ("muon", 2.0, 1)]


def test_what_was_timed_beside_others_is_not_reported(tmp_path):
    assert [cell["tokens_per_second"] for cell in grid(tmp_path).run(fake)] == [3.0, 3.0]
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace('"jobs": 1', '"jobs": 2'))
    assert [cell["tokens_per_second"] for cell in grid(tmp_path).run(fake)] == [None, None]


def test_the_table_has_a_line_a_label_and_the_mean_of_the_columns():
    cell = {"lr": 0.1, "edge": False, "std": 0.25, "optimizer_state_mb": 1.0, "peak_mb": 2.0, "tokens_per_second": None}
    cells = [{**cell, "column": c, "label": "x", "mean": m} for c, m in (("p", 80.0), ("q", 91.0))]
    cells[1] |= {"edge": True, "std": None}
    assert markdown(cells).splitlines()[2] == "| x | 80 ± 0.25 (lr 0.1) | 91 (lr 0.1*) | 85.50 | 1.0 | 2 | - |"


def test_other_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the data of t changed"):
        grid(tmp_path).run(lambda run: {**fake(run), "data": run[1]})


def test_a_second_call_notices_other_rows(tmp_path, model):
    data = folder_of(tmp_path / "data")
    method = {"method": "adamw", "lr": 0.01}
    config = GlueConfig(model=str(model), data=str(data), out=tmp_path / "out", device="cpu", steps=1, **method)
    glue(config)
    before = (tmp_path / "out" / "results.json").read_text()
    rows = data / "rte" / "dev_heldout.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"the rows of rte in data=.* are not those of 'adamw' in .*results\.json"):
        glue(config)
    assert (tmp_path / "out" / "results.json").read_text() == before


def test_rows_without_a_position_are_refused(tmp_path, model):
    folder_of(tmp_path)
    write_rows(tmp_path / "rte" / "dev_heldout.jsonl", [{"s1": "a" * 70, "s2": "b", "label": 0}])
    config = GlueConfig(model=str(model), data=str(tmp_path), out=tmp_path, steps=1, device="cpu")
    with pytest.raises(ValueError, match=r"a row has 71 tokens, .* table of 64 positions: lower context=128 to 64"):
        execute(GlueRun(config, "rte", MethodConfig(method="adamw"), 0))
