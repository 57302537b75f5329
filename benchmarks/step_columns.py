"""What `step_time.py` times: one column of its table for each optimizer, and how each is stepped."""

import gc
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from mofasgd import MoFaSGD  # noqa: E402
from mofasgd.app.galore import GaLore  # noqa: E402

LR = 1e-5
PERIOD = 200
WARM_UP = 3


class Layers(nn.Module):
    """Linear layers without bias around given weights, each with an input and a gradient of its own."""

    def __init__(self, weights):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*w.shape[::-1], bias=False, device="meta") for w in weights)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = nn.Parameter(weight)

    def forward(self, rows):
        outputs, deltas = [], []
        for layer in self.layers:
            m, n = layer.weight.shape
            x, delta = (torch.randn(rows, k, device=layer.weight.device, dtype=layer.weight.dtype) for k in (n, m))
            outputs.append(layer(x))
            deltas.append(delta)
        return outputs, deltas


@dataclass
class Column:
    """An optimizer to be timed, and its times.

    Attributes:
        make: (weights, gradients) -> (optimizer, what is called before each step outside of the clock).
        floor: key of FLOORS.
    """

    name: str
    rank: int | None
    make: object
    floor: str
    row: dict = field(default_factory=dict)
    samples: list = field(default_factory=list)
    peak: int | None = None

    def start(self, bench):
        """Make the optimizer and time its first step, twice: kernels are compiled in the first of a process."""
        cold, peak = self._first(bench)
        warm = cold
        if cold < 500 * bench.seconds:
            warm, peak = self._first(bench)
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        self.row |= {
            "column": self.name,
            "rank": self.rank,
            "cold_first_ms": cold,
            "first_ms": warm,
            "first_peak_bytes": peak,
            "state_bytes": sum(v.numel() * v.element_size() for v in state),
        }
        begin = time.perf_counter()
        for _ in range(WARM_UP):
            if time.perf_counter() - begin < bench.seconds:
                self.prepare()
                self.optimizer.step()
        self.until = bench.seconds

    def _first(self, bench):
        self.stop()
        self.optimizer, self.prepare = self.make(bench.weights, bench.gradients)
        self.prepare()
        before = bench.clock.held()
        bench.clock.peak_above(before)
        spent, _ = bench.clock(self.optimizer.step)
        return spent, bench.clock.peak_above(before)

    def once(self, bench):
        """Take a timed step, unless the time for this column is over; three are always taken."""
        if self.until < 0 and len(self.samples) >= 3:
            return
        begin = time.perf_counter()
        self.prepare()
        before = bench.clock.held()
        bench.clock.peak_above(before)
        self.samples.append(bench.clock(self.optimizer.step))
        self.peak = bench.clock.peak_above(before)
        self.until -= time.perf_counter() - begin

    def finish(self, bench):
        """Write the row."""
        self.row |= summary(self.samples) | {"peak_bytes": self.peak}
        self.row |= {"floor": self.floor, "ratio_floor": self.row["median_ms"] / bench.floors[self.floor]["ms"]}
        if self.name == "galore":
            self._amortize(bench)
        if not all(bool(w.isfinite().all()) for w in bench.weights):
            raise SystemExit(f"{self.name}, rank {self.rank}: a weight is not finite any more")

    def _amortize(self, bench):
        """Replace the times by those over a period."""
        svd = bench.svd_step(self.rank)
        plain = {key: self.row[key] for key in ("median_ms", "min_ms", "quartiles_ms", "ratio_floor")}
        self.row |= {"without_svd": plain, "with_svd_ms": svd, "first_ms": svd, "cold_first_ms": svd}

        def over_period(ms):
            return ((PERIOD - 1) * ms + svd) / PERIOD

        for key in ("median_ms", "min_ms"):
            self.row[key] = over_period(plain[key])
        self.row["quartiles_ms"] = [over_period(q) for q in plain["quartiles_ms"]]
        self.row["ratio_floor"] = self.row["median_ms"] / bench.floors[self.floor]["ms"]

    def stop(self):
        """Drop the optimizer and its state."""
        self.optimizer = self.prepare = None
        gc.collect()


def summary(samples):
    spent, processor = zip(*samples, strict=True)
    quartiles = statistics.quantiles(spent, n=4, method="inclusive")
    return {
        "median_ms": statistics.median(spent),
        "min_ms": min(spent),
        "quartiles_ms": [quartiles[0], quartiles[2]],
        "cpu_ms": statistics.median(processor),
        "steps": len(spent),
    }


def parameters(weights, gradients):
    """Return parameters that share the memory of `weights`."""
    params = [nn.Parameter(w) for w in weights]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient
    return params


def with_gradients(make):
    return lambda weights, gradients: (make(parameters(weights, gradients)), lambda: None)


def after_sketch(rank):
    def make(weights, _):
        model = Layers(weights)
        optimizer = MoFaSGD(model.parameters(), LR, rank=rank)
        handle = optimizer.attach(model, mode="sketch")

        def prepare():
            # Twice the rank: the gradient fills the momentum's tangent space.
            torch.autograd.backward(*model(2 * rank))
            assert handle.nbytes > 0
            assert all(param.grad is None for param in model.parameters())

        return optimizer, prepare

    return make


def galore(rank):
    """GaLore in the middle of a period, with random bases."""

    def make(params):
        optimizer = GaLore(params, LR, rank=rank, gap=PERIOD)
        for param in params:
            basis = torch.linalg.qr(torch.randn(min(param.shape), rank, device=param.device))[0]
            optimizer.state[param] = {"step": torch.ones(()), "basis": basis.to(param.dtype).contiguous()}
        return optimizer

    return with_gradients(make)


def columns(args, result):
    def adamw(**how):
        return with_gradients(lambda params: torch.optim.AdamW(params, LR, weight_decay=0.0, **how))

    found = [
        Column("adamw fused", None, adamw(fused=True), "adamw"),
        Column("adamw foreach", None, adamw(foreach=True), "adamw"),
        Column("muon", None, with_gradients(lambda p: torch.optim.Muon(p, LR, weight_decay=0.0)), "muon"),
    ]
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        result["absent"] = {"adamw 8-bit": str(error)}
    else:
        make = with_gradients(lambda params: AdamW8bit(params, LR, weight_decay=0.0))
        found.append(Column("adamw 8-bit", None, make, "adamw 8-bit"))
    for r in args.ranks:
        dense = with_gradients(lambda params, r=r: MoFaSGD(params, LR, rank=r))
        complement = with_gradients(lambda params, r=r: MoFaSGD(params, LR, rank=r, complement=2.0))
        found += [
            Column("mofasgd", r, dense, "dense"),
            Column("mofasgd after sketch", r, after_sketch(r), "after sketch"),
            Column("mofasgd complement", r, complement, "complement"),
            Column("galore", r, galore(r), "dense"),
        ]
    return [c for c in found if args.columns is None or c.name in args.columns]
