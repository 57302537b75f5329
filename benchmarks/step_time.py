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
import json
import sys
import time
from pathlib import Path

import torch
from step_columns import LR, PERIOD, WARM_UP, columns, parameters, summary
from step_report import compare, plot, table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

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
