"""Validation loss of the byte GPT of `examples/train_gpt.py` under each optimizer, every lr from one grid.

python benchmarks/byte_gpt.py --out docs/results/byte_gpt.json            the grid on one seed, more seeds of the best
python benchmarks/byte_gpt.py --smoke --out /tmp/smoke.json               a minute on a CPU

AdamW trains embedding and head beside every other optimizer, at --adamw-lr; "adamw" has one rate for everything.
Results are written after every run; a second call with the same settings goes on where the first ended.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "examples")]

GRID = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
METHODS = {
    "adamw": {},
    "adamw two rates": {},
    "muon": {},
    "galore r8": {"rank": 8},
    "galore r32": {"rank": 32},
    "mofasgd r8": {"rank": 8},
    "mofasgd r32": {"rank": 32},
    **{f"mofasgd r{r} c{c}": {"rank": r, "complement": float(c)} for r in (8, 32) for c in (1, 2)},
    # Other complements than the package's, for docs/complement.md.
    **{
        f"mofasgd r{r} c{c} {basis}": {"rank": r, "complement": float(c), "basis": basis}
        for r in (8, 32)
        for c in (1, 2)
        for basis in ("old", "new", "columns")
    },
}


class Joint(torch.optim.Optimizer):
    """Two optimizers behind one interface, with groups that one scheduler can drive."""

    def __init__(self, *parts):
        self.parts = parts
        super().__init__([{"params": g["params"], "lr": g["lr"]} for p in parts for g in p.param_groups], {})

    def step(self, closure=None):
        own = iter(self.param_groups)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = next(own)["lr"]
            part.step()


def mofasgd_with(basis):
    """Return MoFaSGD with another complement: of the old or of the new factors' spaces only, or scaled by columns."""
    from mofasgd import MoFaSGD
    from mofasgd.complement import complement_scale, normalized_complement

    class Variant(MoFaSGD):
        def _displace(self, member, before, after, active):
            plain = dataclasses.replace(member, spaces=None)
            move = super()._displace(plain, before, after, active)
            G = member.gradient.dense()
            if basis == "columns":
                Q, P = member.spaces
                extra = normalized_complement(P, Q, G.mT).mT
            else:
                U, _, V = before if basis == "old" else after
                R = G - U @ (U.mT @ G)
                extra = torch.nn.functional.normalize(R - (R @ V) @ V.mT, dim=-1) / G.shape[-2] ** 0.5
            return move._replace(extra=extra * complement_scale(member.group["complement"], *G.shape[-2:]))

    return Variant


def build(model, method, lr, adamw_lr):
    from mofasgd import MoFaSGD, param_groups
    from mofasgd.app.galore import GaLore

    rest = [model.embedding.weight, model.head.weight]
    options = dict(METHODS[method])
    adamw = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    if method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, **adamw)
    if method == "adamw two rates":
        groups = [{"params": list(model.blocks.parameters())}, {"params": rest, "lr": adamw_lr}]
        return torch.optim.AdamW(groups, lr=lr, **adamw)
    if method == "muon":
        muon = torch.optim.Muon(model.blocks.parameters(), lr=lr, weight_decay=0.0)
        return Joint(muon, torch.optim.AdamW(rest, lr=adamw_lr, **adamw))
    if method.startswith("galore"):
        groups = [
            {"params": list(model.blocks.parameters()), "rank": options["rank"]},
            {"params": rest, "lr": adamw_lr},
        ]
        return GaLore(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    basis = options.pop("basis", None)
    kind = mofasgd_with(basis) if basis else MoFaSGD
    return kind(param_groups(model, lr=lr, adamw_lr=adamw_lr, head=model.head, **options))


def run(method, lr, seed, args):
    import train_gpt

    if args["device"] == "cuda":
        torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = train_gpt.GPT().to(args["device"])
    optimizer = build(model, method, lr, args["adamw_lr"])
    begin = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        loss = train_gpt.train(model, optimizer, args["steps"], args["batch"], seed)
    return {"method": method, "lr": lr, "seed": seed, "loss": loss, "seconds": round(time.perf_counter() - begin, 1)}


def environment(device):
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    # A copy of the tree without its history still says which code ran.
    source = hashlib.sha256(b"".join(p.read_bytes() for p in sorted((ROOT / "src").rglob("*.py")))).hexdigest()[:12]
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {**versions, "device": name, "git": git.stdout.strip(), "source": source}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--adamw-lr", type=float, default=3e-3)
    parser.add_argument(
        "--seeds", type=int, default=3, help="of the best lr of each method, the grid's seed 0 included"
    )
    parser.add_argument("--grid", type=float, nargs="+", default=GRID)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the losses do not depend on it")
    parser.add_argument("--smoke", action="store_true", help="4 steps, two learning rates")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = vars(parser.parse_args())
    grid = args["grid"]
    if args["smoke"]:
        args["steps"], args["seeds"], grid = 4, 2, GRID[1:3]
    shared = {k: args[k] for k in ("steps", "batch", "adamw_lr", "device")}
    result = {
        "command": shlex.join(sys.argv),
        "environment": environment(args["device"]),
        "settings": shared,
        "grid": grid,
        "runs": [],
    }

    if args["out"].exists():
        earlier = json.loads(args["out"].read_text())
        if earlier["settings"] != shared:
            parser.error(f"{args['out']} holds runs with other settings {earlier['settings']}: name another file")
        result["runs"] = earlier["runs"]

    def sweep(jobs):
        done = {(r["method"], r["lr"], r["seed"]) for r in result["runs"]}
        jobs = [job for job in jobs if job not in done]
        with ProcessPoolExecutor(args["jobs"], mp_context=get_context("spawn")) as pool:
            for future in as_completed([pool.submit(run, *job, shared) for job in jobs]):
                result["runs"].append(future.result())
                print(result["runs"][-1], flush=True)
                args["out"].write_text(json.dumps(result, indent=1))

    sweep([(method, lr, 0) for method in args["methods"] for lr in grid])
    best = {}
    for method in args["methods"]:
        runs = [r for r in result["runs"] if r["method"] == method]
        best[method] = min(runs, key=lambda r: r["loss"] if r["loss"] == r["loss"] else float("inf"))["lr"]
    sweep([(method, lr, seed) for method, lr in best.items() for seed in range(1, args["seeds"])])
    result["table"] = []
    for method, lr in best.items():
        losses = [r["loss"] for r in result["runs"] if (r["method"], r["lr"]) == (method, lr)]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        row = {"method": method, "lr": lr, "loss": statistics.mean(losses), "std": spread, "seeds": len(losses)}
        result["table"].append(row)
        print("{method:28s} lr {lr:<7g} {loss:.4f} +- {std:.4f} ({seeds} seeds)".format(**row))
    args["out"].write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
