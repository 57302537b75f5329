"""The fine-tuning tables on several GPUs within a time limit: what tells most first, every result kept as it comes.

    python benchmarks/tables.py --deadline 540 --gpus 0 1 --per_gpu 4 \
        --gsm8k "--config benchmarks/finetune_gsm8k.yaml --base.model FOLDER ... --out runs/gsm8k" \
        --glue "--config configs/glue_minilm.yaml --model FOLDER --data FOLDER --out runs/glue"

The middle rate of every method comes first, then its neighbours, then one rate more until each method has had
`points`: beyond the best where that is at an end, else between it and its better neighbour; then the other seeds.
Muon's runs come before all others, each alone on its GPU.
results.json and table.md in each --out are those of the tables' own commands; a second call goes on where the first
ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import finetune_table

from mofasgd.app.tune.grid import Execute, Grid, Job, Result, Spec
from mofasgd.cli import configured

# Only `spawn` starts without what the parent knows of GPUs.
PROCESSES = get_context("spawn")
# Beside other processes torch.optim.Muon has ended in CUDA launch failures (H200, torch 2.11), alone it has not.
ALONE = {"muon"}
"""Methods whose runs share their GPU with no other."""
ATTEMPTS = 2
"""Most starts of a run: a GPU that others fill may refuse it once."""


def next_rate(worth: dict[float, float]) -> float:
    """Return the rate to try after those of `worth` (rate -> lower is better), rounded to two digits."""
    rates = sorted(worth)
    best = min(rates, key=worth.__getitem__)
    place = rates.index(best)
    if place in (0, len(rates) - 1):
        return float(f"{best * best / rates[1 if place == 0 else -2]:.2g}")
    other = min(rates[place - 1], rates[place + 1], key=worth.__getitem__)
    return float(f"{math.sqrt(best * other):.2g}")


def alone(job: Job) -> bool:
    """Whether a run shares its GPU with no other."""
    return job.spec.rates[job.lr].method in ALONE


class Plan:
    """What of a table is to be run, given its results.

    Args:
        grid: the table.
        execute: makes a run.
        points: rates for each cell that starts with two or more.
    """

    def __init__(self, grid: Grid, execute: Callable[[Any], Result], points: int) -> None:
        self.grid, self.execute, self.points = grid, execute, points

    def _worth(self, spec: Spec) -> dict[float, float]:
        """Return the rates that have a result."""
        found = {lr: self.grid.find(self.grid.job(spec, lr, self.grid.seeds[0])) for lr in spec.rates}
        return {lr: self.grid.worth(result) for lr, result in found.items() if result is not None}

    def extended(self, spec: Spec) -> Spec:
        """Return the cell with the rates that its results ask for, as far as they are known."""
        method = next(iter(spec.rates.values()))
        while 1 < len(spec.rates) < self.points and len(worth := self._worth(spec)) == len(spec.rates):
            lr = next_rate(worth)
            if lr in spec.rates:  # its neighbours are closer than two digits
                break
            spec = dataclasses.replace(spec, rates={**spec.rates, lr: dataclasses.replace(method, lr=lr)})
        return spec

    def missing(self) -> Iterator[tuple[int, Job]]:
        """Yield the runs without a result that can begin, each with its stage: lower ones tell more."""
        first, *others = self.grid.seeds
        for start in self.grid.specs:
            middle = sorted(start.rates)[len(start.rates) // 2]
            spec, ready = self.extended(start), True
            for lr in spec.rates:
                job = self.grid.job(spec, lr, first)
                if self.grid.find(job) is None:
                    ready = False
                    yield (0 if lr == middle else 1 if lr in start.rates else 2), job
            top = self.grid.best(spec)
            if ready and top is not None and top[self.grid.score] is not None:
                repeats = [self.grid.job(spec, top["lr"], seed) for seed in others]
                yield from ((3, job) for job in repeats if self.grid.find(job) is None)

    def report(self) -> None:
        """Write the table of what there is; rates without a result are left out."""
        specs = []
        for spec in map(self.extended, self.grid.specs):
            known = self._worth(spec)
            specs.append(dataclasses.replace(spec, rates={lr: m for lr, m in spec.rates.items() if lr in known}))
        self.grid.report(specs)


def serve(pipe: Connection, log: str) -> None:
    """Make the runs that come through `pipe`, one after the other; errors return as text and end the process."""
    with open(log, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    import torch

    while True:
        execute, job = pipe.recv()
        begin = time.monotonic()
        try:
            result = execute(job)
        except Exception as error:  # for the parent to tell
            pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # others share the GPU
        pipe.send({**result, "wall_seconds": round(time.monotonic() - begin, 1)})


@dataclass
class Task:
    """A run that is being made."""

    plan: Plan
    job: Job
    begin: float


class Worker:
    """A process with one GPU that imports once and makes many runs."""

    def __init__(self, gpu: str, log: Path) -> None:
        self.gpu, self.log = gpu, log
        self.start()

    def start(self) -> None:
        """Start the process."""
        self.task: Task | None = None
        os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        self.pipe, other = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=serve, args=(other, str(self.log)), daemon=True)
        self.process.start()
        other.close()

    def answer(self) -> Result | str:
        """Return what the run has come to; after an error the process is another."""
        try:
            found: Result | str = self.pipe.recv()
        except EOFError:
            found = "its process ended; see " + str(self.log)
        if isinstance(found, str):
            self.process.kill()
            self.process.join()
        return found


class Schedule:
    """Deals the runs of several tables out to workers until nothing is left or the time is up.

    Args:
        plans: the tables.
        workers: to deal to.
        end: `time.monotonic()` at which workers are stopped.
        per_gpu: workers on a GPU, noted in the results.
    """

    def __init__(self, plans: Sequence[Plan], workers: Sequence[Worker], end: float, per_gpu: int) -> None:
        self.plans, self.workers, self.end, self.per_gpu = plans, workers, end, per_gpu
        self.failed: dict[str, int] = {}

    def _seconds(self, plan: Plan, job: Job) -> float:
        """Return how long a run should take, from the longest of its cell or, without one, of its column."""
        runs = [run for run in plan.grid.content["runs"] if run["column"] == job.spec.column]
        own = [run for run in runs if run["label"] == job.spec.label]
        return max((run.get("wall_seconds", 0.0) for run in own or runs), default=0.0)

    def _next(self, gpu: str) -> tuple[Plan, Job] | None:
        """Return the run for `gpu` that tells most of those that should end in time."""
        running = {worker.task.job.digest for worker in self.workers if worker.task is not None}
        beside = [worker.task.job for worker in self.workers if worker.task is not None and worker.gpu == gpu]
        if any(alone(job) for job in beside):
            return None
        left, found = self.end - time.monotonic(), []
        for number, plan in enumerate(self.plans):
            for place, (stage, job) in enumerate(plan.missing()):
                if job.digest in running or self.failed.get(job.digest, 0) >= ATTEMPTS or (beside and alone(job)):
                    continue
                # First of all, as a GPU that has filled up is not empty again before the end.
                found.append((not alone(job), stage, number, place, plan, job))
        fitting = [entry for entry in found if self._seconds(entry[4], entry[5]) <= left]
        return min(fitting, key=lambda entry: entry[:4])[4:] if fitting else None

    def _begin(self, worker: Worker) -> None:
        if (found := self._next(worker.gpu)) is not None:
            plan, job = found
            worker.task = Task(plan, job, time.monotonic())
            worker.pipe.send((Execute(plan.execute, self.per_gpu), job))

    def _end(self, worker: Worker) -> None:
        task, answer = worker.task, worker.answer()
        assert task is not None
        worker.task = None
        if isinstance(answer, str):
            self.failed[task.job.digest] = self.failed.get(task.job.digest, 0) + 1
            told = f"FAILED: {answer}"
            worker.start()
        else:
            task.plan.grid.keep(answer)
            told = task.plan.grid.told(answer)
        now = time.monotonic()
        print(
            f"{self.end - now:4.0f} s left, gpu {worker.gpu}, {now - task.begin:3.0f} s: {task.job.name}: {told}",
            flush=True,
        )

    def run(self) -> None:
        """Make the runs; what is unfinished at the end is stopped and lost."""
        while True:
            for worker in self.workers:
                if worker.task is None:
                    self._begin(worker)
            busy = {worker.pipe: worker for worker in self.workers if worker.task is not None}
            left = self.end - time.monotonic()
            if not busy or left <= 0:
                break
            for pipe in wait(list(busy), timeout=left):
                self._end(busy[pipe])  # type: ignore[index]
        for worker in self.workers:
            worker.process.kill()
        for plan in self.plans:
            plan.report()


def plans(args: argparse.Namespace) -> list[Plan]:
    """Return the tables that the command line names."""
    found = []
    if args.gsm8k:
        table, specs = finetune_table.read(shlex.split(args.gsm8k))
        # The process that prints is this one, whatever the tables' own number of jobs.
        table = dataclasses.replace(table, jobs=0)
        found.append(Plan(finetune_table.grid(table, specs), finetune_table.execute, args.points))
    if args.glue:
        from mofasgd.app.tune import glue

        config = configured("glue", shlex.split(args.glue))[1]
        config.jobs = 0
        found.append(Plan(glue.grid(config, glue.specs(config)), glue.execute, args.points))
    for plan in found:
        plan.grid.out.mkdir(parents=True, exist_ok=True)
    return found


def main() -> None:
    """Make the missing runs of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", default="", help="arguments of finetune_table.py")
    parser.add_argument("--glue", default="", help="arguments of mofasgd glue")
    parser.add_argument("--deadline", type=float, required=True, help="seconds")
    parser.add_argument("--gpus", nargs="+", default=["0"], help="numbers of the GPUs")
    parser.add_argument("--per_gpu", type=int, default=1, help="runs at a time on each; times mean nothing above 1")
    parser.add_argument("--points", type=int, default=4, help="rates of each method")
    args = parser.parse_args()
    end = time.monotonic() + args.deadline
    tables = plans(args)
    if not tables:
        parser.error("name a table: --gsm8k, --glue or both")
    logs = tables[0].grid.out
    workers = [Worker(gpu, logs / f"worker-{gpu}-{i}.log") for i in range(args.per_gpu) for gpu in args.gpus]
    Schedule(tables, workers, end, args.per_gpu).run()
    for plan in tables:
        print((plan.grid.out / "table.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
