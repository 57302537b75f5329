"""The command line: configurations, help, and mistakes that end in one clear line."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from app_common import tiny, write_config

from mofasgd import cli
from mofasgd.app.baselines import METHODS, resolve
from mofasgd.app.compare import check
from mofasgd.app.config import CompareConfig, PretrainConfig
from mofasgd.app.tune.config import FinetuneConfig, GlueConfig, PlanConfig, ProfileConfig

ROOT = Path(__file__).parents[1]


def parse(command, *arguments):
    """Return the configuration that `mofasgd COMMAND ARGUMENTS` would run."""
    function = cli._load(command)
    kind = typing.get_type_hints(function)["config"]
    parser = cli._parser(command, function, kind)
    values = dict(parser.instantiate(parser.parse_args([str(a) for a in arguments])))
    del values["config"]
    return kind(**values)


def failure(capsys, *arguments):
    """Return the exit status and the error line of `mofasgd ARGUMENTS`."""
    try:
        status = cli.main([str(a) for a in arguments])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    return status, error


def valid(command, config):
    """Check a configuration as its command would before it begins."""
    if command == "compare":
        check(config)
    elif command == "pretrain":
        resolve(config.optimizer)
    elif command != "export":
        pytest.importorskip("trl")
        from mofasgd.app.tune import glue, methods, plan

        {"glue": glue.specs, "plan": plan.chosen}.get(command, methods.resolve)(config)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_is_valid(path):
    keys = yaml.safe_load(path.read_text())
    command = "glue" if "task" in keys else "compare" if "methods" in keys else "pretrain"
    config = parse(command, "--config", path)
    valid(command, config)
    assert "methods" not in keys or list(config.methods) == list(keys["methods"])


def documented():
    """Return the `mofasgd` calls of the documents and the shipped configurations, and what repeats docs/results."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.yaml")]
    texts = [line for page in pages for line in re.findall(r"^(?:#|  )  +mofasgd (.+)", page.read_text(), flags=re.M)]
    results = [json.loads(path.read_text()) for path in (ROOT / "docs" / "results").glob("*.json")]
    texts += [content["repeat"].removeprefix("mofasgd ") for content in results if "repeat" in content]
    return sorted({shlex.join(shlex.split(text, comments=True)) for text in texts})


@pytest.mark.parametrize("call", documented())
def test_calls_in_the_documents_are_valid(monkeypatch, tmp_path, call):
    monkeypatch.chdir(ROOT)
    # What a line of the page would have left before the next.
    left = {
        "runs/book/config.yaml": write_config(tiny(tmp_path), tmp_path / "book.yaml"),
        "runs/finetune/config.yaml": write_config(FinetuneConfig(), tmp_path / "finetune.yaml"),
    }
    command, *arguments = [str(left.get(word, word)) for word in shlex.split(call)]
    valid(command, parse(command, *arguments))


def test_the_demo_is_one_of_the_runs_behind_its_rates():
    demo, rates = (parse("compare", "--config", ROOT / "configs" / name) for name in ("demo.yaml", "demo_rates.yaml"))
    assert demo.base == rates.base

    def runs(config):
        jobs = [
            dataclasses.replace(method, lr=lr, attach=None)
            for label, method in config.methods.items()
            for lr in config.lrs.get(label, [method.lr])
        ]
        return [dataclasses.astuple(job) for job in jobs]

    assert set(runs(demo)) <= set(runs(rates))


def test_the_fine_tuning_table_is_valid(monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from finetune_table import config_of, read

    from mofasgd.app.tune.methods import resolve

    table, specs = read(["--config", str(ROOT / "benchmarks" / "finetune_gsm8k.yaml"), "--base.model", "a"])
    runs = [config_of(table, method, seed) for spec in specs for method in spec.rates.values() for seed in table.seeds]
    assert {len(spec.rates) for spec in specs} == {4}
    assert all(resolve(run) for run in runs)
    # No two runs share a folder.
    assert len({run.out for run in runs}) == len(runs) == 4 * 2 * len(table.methods)


def test_flags_override_the_file(tmp_path):
    path = write_config(tiny(tmp_path, steps=30), tmp_path / "a.yaml")
    config = parse("pretrain", "--config", path, "--optimizer.rank", 2, "--data.train", "pydoc", "--seed", 7)
    assert (config.steps, config.optimizer.rank, config.data.train, config.seed) == (30, 2, ["pydoc"], 7)
    assert config.optimizer.name == "mofasgd"
    several = parse("pretrain", "--data.train", "[a.txt, b.txt]", "--optimizer.betas", "[0.8, 0.9]")
    assert (several.data.train, several.optimizer.betas) == (["a.txt", "b.txt"], (0.8, 0.9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.lrr", 1], "did you mean 'optimizer.lr'"),
        (["--stesp", 1], "did you mean 'steps'"),
        (["--steps", "many"], "steps"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--steps", 0], "steps=0 should be a whole number of at least 1"),
        (["--model.width", 100], "model.width=100 is no multiple of 2 * heads = 12"),
        (["--data.train", "nowhere.txt"], "data.train=nowhere.txt: there is no such file or folder"),
        (["--optimizer.name", "adamw", "--optimizer.rank", 4], "optimizer.rank=4 does not apply to adamw"),
        (["--tensorboard", "perhaps"], "tensorboard"),
        (["--qqqq", 1], "--help lists all keys"),
        (["--data.train", ""], "data.train has an empty name"),
        (["--data.tokenizer", "nowhere.json"], "data.tokenizer=nowhere.json cannot be read"),
        (["--seed", 10**30], "should be below 2^63"),
        (["--device", "meta"], "device='meta' is not usable"),
    ],
)
def test_a_wrong_call_ends_in_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, error = failure(capsys, "pretrain", *arguments)
    assert status in (1, 2)
    assert message in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optimizer: {lrr: 3}", "did you mean 'optimizer.lr'"),
        ("stepz: 3", "did you mean 'steps'"),
        ("optimizer: {lr: 3", "parsing"),
    ],
)
def test_a_wrong_file_ends_in_one_line(capsys, tmp_path, content, message):
    (tmp_path / "a.yaml").write_text(content)
    status, error = failure(capsys, "pretrain", "--config", tmp_path / "a.yaml")
    assert status == 2
    assert message in error


def test_a_wrong_comparison_ends_in_one_line(capsys, tmp_path):
    cases = [
        ("methods: {A: {name: adamw, lrx: 3}}", "did you mean"),
        ("methods: {A: {name: adamw, rank: 3}}", "optimizer.rank=3 does not apply"),
        ("{methods: {A: {name: adamw}}, lrs: {B: [1]}}", "lrs has the label 'B'"),
        ("{methods: {A: {name: adamw}}, seeds: []}", "seeds=[]"),
        ("{methods: {A: {name: adamw}}, jobs: 0}", "jobs=0"),
        ("jobs: 1", "methods is empty"),
        ("{methods: {A: {name: adamw}}, lrs: {A: [0.1, 0.1]}}", "names a rate twice"),
        ("{methods: {A: {name: adamw}}, lrs: {A: [-1]}}", "optimizer.lr=-1"),
        ("{methods: {A: {name: adamw}}, base: {seed: 3}}", "base.seed has no effect"),
        ("{methods: {A: {name: adamw}}, base: {stepz: 3}}", "did you mean 'base.steps'"),
    ]
    for content, message in cases:
        (tmp_path / "a.yaml").write_text(content)
        status, error = failure(capsys, "compare", "--config", tmp_path / "a.yaml", "--out", tmp_path / "out")
        assert status in (1, 2)
        assert message in error


def test_commands(capsys):
    assert failure(capsys, "pretrian")[1].endswith("did you mean 'pretrain'?\n")
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"    {command} " in text for command in cli.COMMANDS)
    assert cli.main(["--version"]) == 0


def fields(kind, prefix=""):
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


KINDS = {
    "pretrain": PretrainConfig,
    "compare": CompareConfig,
    "finetune": FinetuneConfig,
    "glue": GlueConfig,
    "profile": ProfileConfig,
    "plan": PlanConfig,
}


@pytest.mark.parametrize(("command", "kind"), KINDS.items())
def test_the_help_explains_every_key(command, kind):
    parser = cli._parser(command, cli._load(command), kind)
    explained = {action.dest: action.help for action in parser._actions}
    for name in fields(kind):
        assert explained[name], name
    if command == "pretrain":
        assert all(f"{method}: " in parser.format_help() for method in METHODS)


def test_the_module_is_a_program():
    done = subprocess.run([sys.executable, "-m", "mofasgd.cli", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no command 'nothing'" in done.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("finetune", ["--methd", "lora"], "did you mean 'method'"),
        ("finetune", ["--data.trian", "a"], "did you mean 'data.train'"),
        ("finetune", ["--batch_size", 6, "--micro_batch_size", 4], "batch_size=6 is no multiple of micro_batch_size=4"),
        ("finetune", ["--warmup", 0.5], "warmup=0.5 and cooldown=0.95 overlap"),
        ("finetune", ["--device", "tpu"], "device='tpu' is unknown"),
        ("finetune", ["--data.context", 1], "data.context=1"),
        ("glue", ["--seeds", "[1, 1]"], "seeds=[1, 1]"),
        ("glue", ["--task", "rtee"], "task='rtee' is unknown; did you mean 'rte'?"),
        ("profile", ["--steps", 0], "steps=0"),
        ("profile", [], "model is empty"),
        ("plan", ["--batchsize", 2], "did you mean 'batch_size'"),
        ("plan", [], "model is empty"),
    ],
)
def test_a_wrong_call_of_fine_tuning_ends_in_one_line(capsys, monkeypatch, tmp_path, command, arguments, message):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    status, error = failure(capsys, command, *arguments)
    assert status in (1, 2)
    assert message in error


def test_fine_tuning_without_its_extra_names_the_fix():
    script = "import sys; sys.modules['trl'] = None; from mofasgd.cli import main; sys.exit(main(['finetune']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'mofasgd[tune]'" in done.stderr
    listed = subprocess.run([sys.executable, "-X", "importtime", "-m", "mofasgd.cli", "--help"], capture_output=True)
    assert b" transformers" not in listed.stderr


def test_without_the_extra_the_fix_is_named():
    script = (
        "import sys; sys.modules['jsonargparse'] = None; from mofasgd.cli import main; sys.exit(main(['pretrain']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'mofasgd[train]'" in done.stderr
