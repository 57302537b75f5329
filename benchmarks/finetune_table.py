"""Several methods on the same rows and steps, `mofasgd finetune` each: validation loss per answer token, memory, speed.

Results, as they come, are in OUT/results.json; a second call goes on where the first ended. OUT/table.md is the table.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse

from mofasgd.app.display import Display
from mofasgd.app.errors import Diverged
from mofasgd.app.files import read_json
from mofasgd.app.tune.config import FinetuneConfig, MethodConfig, RowsConfig
from mofasgd.app.tune.encode import Example, load
from mofasgd.app.tune.finetune import train
from mofasgd.app.tune.folder import identity
from mofasgd.app.tune.grid import Grid, Spec
from mofasgd.app.tune.methods import resolve
from mofasgd.app.tune.rows import Skipped


@dataclass
class TableConfig:
    """Methods side by side."""

    out: Path = Path("runs/finetune_table")
    """folder for results.json, table.md and a folder per run"""
    base: FinetuneConfig = field(default_factory=FinetuneConfig)
    """what all runs share, but for out, seed and the method with its settings"""
    methods: dict[str, MethodConfig] = field(default_factory=dict)
    """label of a row -> method with its settings"""
    lrs: dict[str, list[float]] = field(default_factory=dict)
    """label -> learning rates to try with the first seed"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """the first for the learning rates, the others with the best of them"""
    jobs: int = 1
    """runs at a time, each a process"""


def config_of(table: TableConfig, method: MethodConfig, seed: int) -> FinetuneConfig:
    """The run of a method with its rate, in a folder of its own."""
    settings = {f.name: getattr(method, f.name) for f in dataclasses.fields(MethodConfig)}
    own = re.sub(r"[^a-z0-9.]+", "-", " ".join(f"{k} {v}" for k, v in settings.items() if v is not None))
    out = table.out / f"{own.strip('-')}-seed{seed}"
    return dataclasses.replace(table.base, **settings, seed=seed, out=out, save_model=False)


_ROWS: dict[str, tuple[list[Example], list[Example], Skipped]] = {}


def rows_of(tokenizer: Any, config: RowsConfig, skipped: Skipped) -> tuple[list[Example], list[Example]]:
    """`encode.load`, once a process and data: it may take longer than a run."""
    key = f"{tokenizer.name_or_path} {config}"
    if key not in _ROWS:
        found = Skipped()
        _ROWS[key] = (*load(tokenizer, config, found), found)
    train_rows, validation, found = _ROWS[key]
    skipped.counts.update(found.counts)
    skipped.first.update(found.first)
    return train_rows, validation


def execute(config: FinetuneConfig) -> dict[str, Any]:
    """Run it from its start; a diverged run has no loss."""
    # What a killed call has left there is not a result.
    shutil.rmtree(config.out, ignore_errors=True)
    result: dict[str, Any] = {"validation_loss": None}
    try:
        result = train(config, Display(quiet=True), rows_of)
    except Diverged as error:
        result["diverged"] = str(error)
    record = read_json(config.out / "run.json")
    kept = {key: record[key] for key in ("settings", "model", "before")}
    return {**kept, **result, "data": record["identity"]["data"], "environment": record["sessions"][-1]}


def read(arguments: list[str] | None) -> tuple[TableConfig, list[Spec]]:
    """The configuration that a command line gives, and the cells of its table."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TableConfig, None)
    values = dict(parser.instantiate(parser.parse_args(arguments)))
    values.pop("config")
    table = TableConfig(**values)
    specs = []
    for label, method in table.methods.items():
        rates = table.lrs.get(label) or [resolve(method)["lr"]]
        specs.append(Spec("validation loss", label, {lr: dataclasses.replace(method, lr=lr) for lr in rates}))
    return table, specs


def grid(table: TableConfig, specs: list[Spec]) -> Grid:
    """Return the table of cells `specs`."""
    return Grid(
        table.out,
        specs,
        table.seeds,
        table.jobs,
        score="validation_loss",
        highest=False,
        make=lambda column, method, seed: config_of(table, method, seed),
        # By its names the data is told apart before it is read; its checksum is compared afterwards.
        identity=lambda run: {**identity(run, resolve(run), f"{run.data}")},
    )


def main(arguments: list[str] | None = None) -> None:
    """Make the runs that are missing and show the table."""
    table, specs = read(arguments)
    table.out.mkdir(parents=True, exist_ok=True)
    grid(table, specs).run(execute)


if __name__ == "__main__":
    main()
