"""Time of one optimizer step: MoFaSGD (dense, with the complement, after sketch mode) beside AdamW, Muon and GaLore.

python benchmarks/step_time.py --out docs/results/step_time.json            Llama-3.1-8B, bf16, one 80 GB GPU or more
python benchmarks/step_time.py --model gpt2-small --ranks 32 --device cpu --dtype float32 --threads 2 --out cpu.json
python benchmarks/step_time.py --tiny --out /tmp/tiny.json                  seconds on a CPU, to try the script

All columns step the same weights by the same random gradients. "after sketch" runs forward and backward of linear
layers with these weights, on fresh random rows, before each step and outside of the clock. A floor is the bytes that
a step cannot avoid (gradient, weight and AdamW's moments; no factors) at the bandwidth of a copy, measured first.
GaLore is (period - 1) steps without an SVD and one with it, over the period; the latter is timed on one layer and
multiplied, since a matrix's SVD takes the time it takes. On a CPU the columns take turns, step by step, so that what
else runs there slows them all. A plot of the ratios is written beside the JSON.
"""

import argparse
import contextlib
import gc
import json
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
from mofasgd.app.record import environment  # noqa: E402


def llama(width, inner, kv):
    return {"q, o": (width, width, 2), "k, v": (kv, width, 2), "gate, up": (inner, width, 2), "down": (width, inner, 1)}


def gpt2(width):
    shapes = {"qkv": 3 * width, "out": width, "up": 4 * width}
    return {name: (m, width, 1) for name, m in shapes.items()} | {"down": (width, 4 * width, 1)}


# name: (layers, matrices of one layer as {name: (out, in, how many)})
MODELS = {
    "llama-8b": (32, llama(4096, 14336, 1024)),
    "llama-70b": (1, llama(8192, 28672, 1024)),
    "gpt2-small": (12, gpt2(768)),
    "tiny": (2, gpt2(64)),
}
# What a step reads and writes at least, in (numbers of the weight's dtype, further bytes) for each of its elements:
# gradient (twice with the complement) and weight twice, a moment twice.
FLOORS = {
    "dense": (3, 0),
    "after sketch": (2, 0),
    "complement": (4, 0),
    "adamw": (7, 0),
    "adamw 8-bit": (3, 4),
    "muon": (5, 0),
}
LR = 1e-5
PERIOD = 200
WARM_UP = 3


class Clock:
    """Milliseconds of a call: until its work is done, and the processor's.

    The latter is the time until the call returns on CUDA, and the time of all threads on a CPU, which what else runs
    there does not count into.
    """

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def __call__(self, call):
        if not self.cuda:
            begin, used = time.perf_counter(), time.process_time()
            call()
            return 1e3 * (time.perf_counter() - begin), 1e3 * (time.process_time() - used)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        start.record()
        call()
        end.record()
        returned = 1e3 * (time.perf_counter() - begin)
        end.synchronize()
        return start.elapsed_time(end), returned

    def held(self):
        return torch.cuda.memory_allocated() if self.cuda else 0

    def peak_above(self, before):
        """Return the most bytes held since the last call, above `before`; None on a CPU."""
        if not self.cuda:
            return None
        peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        return peak


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


class Bench:
    """Weights, gradients, clock and floors."""

    def __init__(self, args, device):
        self.clock, self.seconds, self.steps = Clock(device), args.seconds, args.steps
        self.svd = None
        default, kinds = MODELS[args.model]
        self.layers = args.layers or default
        shapes = [(m, n) for m, n, count in kinds.values() for _ in range(count)]
        how = {"device": device, "dtype": getattr(torch, args.dtype)}
        # Layer by layer, the order of a model's parameters.
        self.weights = [torch.randn(shape, **how).mul_(0.02) for _ in range(self.layers) for shape in shapes]
        self.gradients = [torch.randn(shape, **how).mul_(1e-3) for _ in range(self.layers) for shape in shapes]
        self.elements = sum(w.numel() for w in self.weights)
        self.bandwidth = self._copy(device)
        width = self.weights[0].element_size()
        floors = {name: self.elements * (numbers * width + more) for name, (numbers, more) in FLOORS.items()}
        self.floors = {name: {"bytes": size, "ms": 1e3 * size / self.bandwidth} for name, size in floors.items()}

    def _copy(self, device):
        """Return bytes read and written per second by the fastest of 13 copies of 2 GiB (256 MiB on a CPU)."""
        source = torch.randint(255, (2**31 if self.clock.cuda else 2**28,), dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        times = [self.clock(lambda: target.copy_(source)) for _ in range(13)]
        # A CPU's by processor time: nobody else's work counts.
        fastest = min(spent if self.clock.cuda else used / torch.get_num_threads() for spent, used in times)
        return 2e3 * source.numel() / fastest

    def svd_step(self, rank):
        """Return milliseconds of GaLore's step with an SVD, timed once: it makes all vectors whatever the rank."""
        if self.svd is None:
            one = len(self.weights) // self.layers
            params = parameters(self.weights[:one], self.gradients[:one])
            spent, _ = self.clock(GaLore(params, LR, rank=rank, gap=PERIOD).step)
            self.svd = self.layers * spent
        return self.svd

    def run(self, chosen, take_turns):
        """Time the columns and yield each; one that the memory does not hold gets a row that says so."""
        for batch in [chosen] if take_turns else [[column] for column in chosen]:
            try:
                for column in batch:
                    column.start(self)
                for _ in range(self.steps):
                    for column in batch:
                        column.once(self)
                for column in batch:
                    column.finish(self)
            except torch.OutOfMemoryError:
                column.row = {"column": column.name, "rank": column.rank, "error": "out of memory"}
                column.stop()
            yield from batch


def capture(bench, column):
    """Time replays of a CUDA graph of the column's step; a failure's text comes instead of times."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                column.optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            column.optimizer.step()
        for _ in range(WARM_UP):
            graph.replay()
        times = [bench.clock(graph.replay) for _ in range(bench.steps)]
    except RuntimeError as error:
        return {"error": str(error).strip().splitlines()[0]}
    if not all(bool(w.isfinite().all()) for w in bench.weights):
        return {"error": "replays made a weight that is not finite"}
    return summary(times)


def compare(rows):
    """Add to each row its ratios to AdamW, by medians, by the fastest steps and by processor time."""
    for how in ("fused", "foreach"):
        base = next((row for row in rows if row["column"] == f"adamw {how}"), None)
        for row in rows if base else ():
            if "median_ms" in row:
                row[f"ratio_{how}"] = row["median_ms"] / base["median_ms"]
                row[f"ratio_{how}_min"] = row["min_ms"] / base["min_ms"]
                row[f"ratio_{how}_cpu"] = row["cpu_ms"] / base["cpu_ms"]


def table(rows, floors):
    keys = {
        "median_ms": "median ms",
        "min_ms": "min ms",
        "cpu_ms": "cpu ms",
        "first_ms": "first ms",
        "ratio_fused": "/fused",
        "ratio_foreach": "/foreach",
        "ratio_foreach_min": "/foreach, min",
        "ratio_foreach_cpu": "/foreach, cpu",
        "ratio_floor": "/floor",
        "peak_bytes": "peak MiB",
    }

    def cell(key, value):
        if value is None:
            return "-"
        return f"{value / 2**20:.1f}" if key == "peak_bytes" else f"{value:.3f}"

    lines = [f"{'column':28s} {'rank':>4s}" + "".join(f"{title:>14s}" for title in keys.values())]
    for row in rows:
        cells = row.get("error") or "".join(f"{cell(key, row.get(key)):>14s}" for key in keys)
        lines.append(f"{row['column']:28s} {row['rank'] or '':>4}{cells}")
    lines += [f"{'floor, ' + name:28s} {'':>4s}{floor['ms']:14.3f}" for name, floor in floors.items()]
    return "\n".join(lines)


def plot(result, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, floors = [r for r in result["rows"] if "ratio_fused" in r], result["floors"]
    base = next((row["median_ms"] for row in rows if row["column"] == "adamw fused"), None)
    if base is None:
        return
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    names = list(dict.fromkeys(row["column"] for row in rows))
    for number, name in enumerate(names):
        points = [(row["rank"], row["ratio_fused"]) for row in rows if row["column"] == name]
        color = f"C{number % 10}"
        if points[0][0] is None:
            axes.axhline(points[0][1], color=color, label=name)
        else:
            axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=name)
    for style, name in zip(("--", ":", "-."), ("dense", "after sketch", "complement"), strict=True):
        axes.axhline(floors[name]["ms"] / base, color="black", linewidth=1, linestyle=style, label=f"floor, {name}")
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="time of a step / fused AdamW's")
    axes.set_xticks(result["ranks"], [str(r) for r in result["ranks"]])
    axes.set_xticks([], minor=True)
    axes.set_title(
        f"{result['model']}, {result['layers']} layers, {result['dtype']}, {result['environment']['device']}"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON; the plot is written beside it as .png")
    parser.add_argument("--model", choices=list(MODELS), default="llama-8b")
    parser.add_argument("--layers", type=int, help="other than the model has")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128, 256])
    parser.add_argument("--columns", nargs="+", help="these only, by the names in the table")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each column")
    parser.add_argument("--seconds", type=float, default=5.0, help="no more steps of a column after these; at least 3")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--tiny", action="store_true", help="two small layers in float32 on the CPU, five steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.dtype, args.device, args.ranks, args.steps = "tiny", "float32", "cpu", [4, 8], 5
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.manual_seed(0)
    bench = Bench(args, device)
    rows = []
    result = {
        "environment": environment(device),
        "seed": 0,
        "model": args.model,
        "layers": bench.layers,
        "shapes": MODELS[args.model][1],
        "parameters": bench.elements,
        "dtype": args.dtype,
        "ranks": args.ranks,
        "galore_period": PERIOD,
        "copy_bytes_per_second": bench.bandwidth,
        "floors": bench.floors,
        "rows": rows,
    }

    def record(row):
        rows.append(row)
        compare(rows)
        args.out.write_text(json.dumps(result, indent=1))

    chosen, graphs = columns(args, result), []
    if not chosen:
        parser.error(f"--columns {' '.join(args.columns)}: no such column")
    for column in bench.run(chosen, take_turns=not bench.clock.cuda):
        record(column.row)
        if column.name == "mofasgd" and bench.clock.cuda and "error" not in column.row:
            graphs.append(column)
        else:
            column.stop()
    # Last, since a capture that fails may leave CUDA unfit for more.
    for column in graphs:
        found = capture(bench, column)
        record({"column": "mofasgd, graph", "rank": column.rank, "floor": "dense", **found})
        if "error" in found:
            break
        rows[-1]["ratio_floor"] = found["median_ms"] / bench.floors["dense"]["ms"]
    args.out.write_text(json.dumps(result, indent=1))
    print(table(rows, bench.floors))
    with contextlib.suppress(ImportError):
        plot(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
