"""Methods x learning rates x seeds: the runs that are missing are made, the best rate is repeated and reported."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from mofasgd.app.apart import sweep
from mofasgd.app.display import Display
from mofasgd.app.errors import Stopped
from mofasgd.app.files import read_json, write_json, write_text
from mofasgd.app.tune.config import MethodConfig
from mofasgd.app.tune.methods import resolve

Result = dict[str, Any]
Run = TypeVar("Run")


@dataclass(frozen=True)
class Spec:
    """One cell of the table: a column (a task), a row's label, and its method by learning rate."""

    column: str
    label: str
    rates: dict[float, MethodConfig]


@dataclass(frozen=True)
class Job:
    """One run, and what decides its result."""

    spec: Spec
    lr: float
    seed: int
    run: Any
    digest: str

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.spec.column}, {self.spec.label}, lr {self.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class Execute:
    """Runs a job in whatever process: pickled, unlike a closure."""

    function: Callable[[Any], Result]
    workers: int

    def __call__(self, job: Job) -> Result:
        """Return the result with what tells it from others."""
        found = self.function(job.run)
        place = {"column": job.spec.column, "label": job.spec.label, "lr": job.lr, "seed": job.seed}
        return {**place, "digest": job.digest, "jobs": self.workers, **found}


class Grid:
    """The runs of a table, kept in results.json as they finish.

    Args:
        out: folder for results.json and table.md.
        specs: cells of the table.
        seeds: the first for all rates, the others for the best of them.
        workers: runs at a time.
        score: key of the results that is compared; None in a result: diverged.
        highest: whether a high score is good.
        make: column, method and seed to a run.
        identity: a run to what decides its result.
    """

    def __init__(
        self,
        out: Path,
        specs: Sequence[Spec],
        seeds: Sequence[int],
        workers: int,
        *,
        score: str,
        highest: bool,
        make: Callable[[str, MethodConfig, int], Run],
        identity: Callable[[Run], dict[str, Any]],
    ) -> None:
        self.out, self.specs, self.seeds, self.workers = out, specs, seeds, workers
        self.score, self.highest, self.make, self.identity = score, highest, make, identity
        self.path = out / "results.json"
        self.content: dict[str, Any] = read_json(self.path) if self.path.exists() else {"runs": []}

    def job(self, spec: Spec, lr: float, seed: int) -> Job:
        """Return the run of a cell with one of its rates."""
        method = spec.rates[lr]
        run = self.make(spec.column, method, seed)
        deciding = [spec.column, spec.label, seed, method.method, resolve(method), self.identity(run)]
        digest = hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return Job(spec, lr, seed, run, digest)

    def find(self, job: Job) -> Result | None:
        """Return the result that is kept of a job."""
        return next((run for run in self.content["runs"] if run["digest"] == job.digest), None)

    def keep(self, result: Result) -> None:
        """Add a result to results.json."""
        self.content["runs"].append(result)
        write_json(self.path, self.content)
        if self.workers == 1:
            place = "{column}, {label}, lr {lr:g}, seed {seed}".format(**result)
            Display().note(f"{place}: {self.told(result)}")

    def told(self, result: Result) -> str:
        """Return a result as a message."""
        return "diverged" if result[self.score] is None else f"{self.score} {result[self.score]:.5g}"

    def _sweep(self, jobs: Sequence[Job], execute: Callable[[Any], Result]) -> None:
        missing = [job for job in jobs if self.find(job) is None]
        if len(missing) < len(jobs):
            Display().note(f"{self.path} has {len(jobs) - len(missing)} of {len(jobs)} runs already")
        runner = Execute(execute, self.workers)
        sweep(missing, runner, self.workers, self.keep, lambda job: job.name, self.told)

    def worth(self, result: Result) -> float:
        """Return a number that is lower for a better result."""
        value = result[self.score]
        return float("inf") if value is None else -value if self.highest else value

    def _results(self, jobs: Sequence[Job]) -> list[Result]:
        return [result for job in jobs if (result := self.find(job)) is not None]

    def found(self, column: str) -> list[Result]:
        """Return the results with the first seed that are kept of a column."""
        specs = [spec for spec in self.specs if spec.column == column]
        return self._results([self.job(spec, lr, self.seeds[0]) for spec in specs for lr in spec.rates])

    def run(self, execute: Callable[[Any], Result]) -> list[Result]:
        """Make the runs that are missing; write and show the table; return its cells.

        Raises:
            Stopped: if a run failed or was interrupted; finished ones are kept.
        """
        first, *others = self.seeds
        try:
            self._sweep([self.job(spec, lr, first) for spec in self.specs for lr in spec.rates], execute)
            best = [(spec, self.best(spec)) for spec in self.specs]
            repeats = [(spec, top["lr"]) for spec, top in best if top is not None and top[self.score] is not None]
            self._sweep([self.job(spec, lr, seed) for spec, lr in repeats for seed in others], execute)
        except (Stopped, KeyboardInterrupt) as error:
            reason = str(error) or "interrupted."
            raise Stopped(f"{reason} The same call again makes the missing runs only") from error
        cells = self.report(self.specs)
        display = Display()
        display.console.print(table(cells))
        display.note(f"{self.path} has all runs, {self.out / 'table.md'} the table")
        return cells

    def best(self, spec: Spec) -> Result | None:
        """Return the best result with the first seed, None if there is none yet."""
        return min(
            self._results([self.job(spec, lr, self.seeds[0]) for lr in spec.rates]), key=self.worth, default=None
        )

    def report(self, specs: Sequence[Spec]) -> list[Result]:
        """Write and return the cells of `specs` that have a result."""
        cells = []
        for spec in specs:
            if (top := self.best(spec)) is not None:
                others = self._results([self.job(spec, top["lr"], seed) for seed in self.seeds[1:]])
                cells.append(self._cell(spec, [top, *others]))
        self._same_data()
        self.content["cells"] = cells
        write_json(self.path, self.content)
        write_text(self.out / "table.md", markdown(cells))
        return cells

    def _cell(self, spec: Spec, runs: list[Result]) -> Result:
        values, tried, first = [run[self.score] for run in runs], sorted(spec.rates), runs[0]
        costs = {key: first.get(key) for key in ("optimizer_state_mb", "peak_mb", "tokens_per_second")}
        return {
            "column": spec.column,
            "label": spec.label,
            "lr": first["lr"],
            # A best value at the end of the grid may not be the best there is.
            "edge": len(tried) > 1 and first["lr"] in (tried[0], tried[-1]),
            "mean": None if None in values else statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 and None not in values else None,
            "seeds": len(values),
            **costs,
            # Runs beside others slow each other down.
            "tokens_per_second": costs["tokens_per_second"] if first["jobs"] == 1 else None,
        }

    def _same_data(self) -> None:
        """Raise ValueError if runs of a column did not have the same rows."""
        seen: dict[str, Result] = {}
        for run in self.content["runs"]:
            other = seen.setdefault(run["column"], run)
            if other["data"] != run["data"]:
                raise ValueError(
                    f"the data of {run['column']} changed between the runs of {other['label']!r} and {run['label']!r}: "
                    "name another --out"
                )


def _shown(cell: Result | None) -> str:
    if cell is None:
        return "-"
    if cell["mean"] is None:
        return f"diverged (lr {cell['lr']:g})"
    spread = "" if cell["std"] is None else f" ± {cell['std']:.2g}"
    return f"{cell['mean']:.5g}{spread} (lr {cell['lr']:g}{'*' if cell['edge'] else ''})"


def _lines(cells: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the table; with several columns their mean is the last of them."""
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    labels = list(dict.fromkeys(cell["label"] for cell in cells))
    head = ["", *columns, *(["mean"] if len(columns) > 1 else []), "state MB", "peak MB", "tokens/s"]
    lines = []
    for label in labels:
        own = {cell["column"]: cell for cell in cells if cell["label"] == label}
        means: list[Any] = [own[column]["mean"] if column in own else None for column in columns]
        mean = "-" if None in means else f"{statistics.fmean(means):.2f}"
        costs = []
        for key, form in (("optimizer_state_mb", ".1f"), ("peak_mb", ".0f"), ("tokens_per_second", ",.0f")):
            found = [cell[key] for cell in own.values() if cell[key] is not None]
            costs.append(f"{max(found):{form}}" if found else "-")
        lines.append([label, *(_shown(own.get(c)) for c in columns), *([mean] if len(columns) > 1 else []), *costs])
    return head, lines


def table(cells: Sequence[Result]) -> Table:
    """Return the cells as a table for the terminal."""
    head, lines = _lines(cells)
    out = Table(*head)
    for line in lines:
        out.add_row(*line)
    if any(cell["edge"] for cell in cells):
        out.caption = "* at the end of the learning rates that were tried"
    return out


def markdown(cells: Sequence[Result]) -> str:
    """Return the cells as a Markdown table."""
    head, lines = _lines(cells)
    rows = [head, ["---"] * len(head), *lines]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
    return text + ("\n\\* at the end of the learning rates that were tried\n" if any(c["edge"] for c in cells) else "")
