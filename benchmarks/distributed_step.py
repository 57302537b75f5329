"""Time, bytes all-reduced and peak memory of data-parallel training steps: MoFaSGD and AdamW under DDP and FSDP2.

torchrun --standalone --nproc-per-node 2 benchmarks/distributed_step.py --out docs/results/distributed_step.json
torchrun --standalone --nproc-per-node 2 benchmarks/distributed_step.py --backend gloo --models gpt --out ...
torchrun --standalone --nproc-per-node 2 benchmarks/distributed_step.py --tiny --device cpu --out /tmp/tiny.json

Models: the 0.11 B GPT of `mofasgd.app.model` (blocks factored, embedding and head with AdamW) and a Llama of 3.2 B
parameters (shapes of Llama-3.2-3B, random, tied embedding factored as well), in bfloat16; rank 32. Every rank has its
own batch, so the work per rank is the same for any number of ranks. Runs are appended to the file: one process and
several, NCCL and gloo (a slow link: it stages GPU tensors through the host) stand side by side.

`engine_bytes` of a row is computed, what DDP or FSDP2 itself sends for a step: gradients in the weights' dtype, and for
FSDP2 two gathers of the weights as well. `sketch_bytes` is counted by `MoFaSGD.traffic`. `alone` is the time of an
all-reduce of both without any work to hide it behind (FSDP2's gathers not included).
"""

import argparse
import json
import os
import statistics
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from device import Device
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from mofasgd import MoFaSGD, param_groups  # noqa: E402
from mofasgd.app.model import GPT  # noqa: E402
from mofasgd.app.record import environment  # noqa: E402
from mofasgd.dist.reduce import BUCKET, Ranks  # noqa: E402

WARM = 6
"""Steps before those that are timed: momenta start in the first ones, layer after layer in a GPT of zero blocks."""
METHODS = ("ddp mofasgd", "ddp adamw", "fsdp2 mofasgd", "fsdp2 adamw")
GPT_SHAPE = {"vocab_size": 16384, "context": 1024, "layers": 12, "width": 768, "heads": 6}
LLAMA_SHAPE = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY_GPT = {"vocab_size": 512, "context": 32, "layers": 2, "width": 128, "heads": 2}
TINY_LLAMA = dict(zip(LLAMA_SHAPE, (128, 256, 2, 4, 2, 512), strict=True))


def build(name, args, device):
    """Return (model, its blocks, patterns to factor beside the blocks, batch, length)."""
    torch.manual_seed(0)
    with device:
        if name == "gpt":
            shape = TINY_GPT if args.tiny else GPT_SHAPE
            model = GPT(**shape).bfloat16()
            return model, list(model.blocks), (), 2 if args.tiny else 16, shape["context"]
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_default_dtype(torch.bfloat16)
        shape = TINY_LLAMA if args.tiny else LLAMA_SHAPE
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, use_cache=False))
        torch.set_default_dtype(torch.float32)
    return model, list(model.model.layers), ("model.embed_tokens.weight",), 2, 32 if args.tiny else 2048


def loss_of(called, tokens):
    logits = called(tokens)
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def start(method, model, blocks, factor, rank):
    """Return (what is called, the optimizer)."""
    engine, optimizer = method.split()
    if engine == "fsdp2":
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
    if optimizer == "adamw":
        opt = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    else:
        opt = MoFaSGD(param_groups(model, rank=rank, lr=1e-4, adamw_lr=1e-5, factor=factor))
        opt.attach(model)
    wrap = engine == "ddp" and distributed.get_world_size() > 1
    if wrap and any(p.requires_grad and not hasattr(p, "_ddp_ignored") for p in model.parameters()):
        return DDP(model, gradient_as_bucket_view=True), opt
    return model, opt


def engine_bytes(method, model, opt):
    """Return (bytes reduced, bytes gathered) by DDP or FSDP2 in a step."""
    if distributed.get_world_size() == 1:
        return 0, 0
    sketched = {row.param for row in opt.handle.rows if row.mode == "sketch"} if isinstance(opt, MoFaSGD) else set()
    sizes = {p: p.numel() * p.element_size() for p in model.parameters()}
    reduced = sum(size for p, size in sizes.items() if p not in sketched)
    return reduced, 2 * sum(sizes.values()) if method.startswith("fsdp2") else 0


def alone(size, device, clock, repeats=5):
    """Return the median seconds of an all-reduce of `size` bytes in fused buckets, with nothing beside it."""
    ranks = Ranks(distributed.group.WORLD)
    counts = [BUCKET // 4] * (size // BUCKET) + [size % BUCKET // 4]
    buffers = [torch.zeros(count, device=device) for count in counts if count]
    seconds = []
    for _ in range(repeats + 1):
        distributed.barrier()
        begin = clock.now()
        ranks.sum(buffers)
        seconds.append(clock.now() - begin)
    return statistics.median(seconds[1:])


def measure(name, method, args, device):
    """Return one row. After WARM steps some are timed whole, and as many with their optimizer's step apart."""
    clock = Device(device)
    clock.reset()
    model, blocks, factor, batch, length = build(name, args, device)
    numbers = sum(p.numel() for p in model.parameters())
    called, opt = start(method, model, blocks, factor, args.rank)
    vocabulary = (TINY_GPT if args.tiny else GPT_SHAPE)["vocab_size"] if name == "gpt" else model.config.vocab_size
    data = torch.Generator().manual_seed(distributed.get_rank())
    tokens = torch.randint(vocabulary, (batch, length), generator=data).to(device)
    whole, steps, sent = [], [], 0
    for step in range(WARM + 2 * args.steps):
        if isinstance(opt, MoFaSGD) and step == WARM:
            sent = opt.traffic.bytes
        distributed.barrier()
        begin = clock.now()
        loss = loss_of(called, tokens)
        loss.backward()
        apart = clock.now() if step >= WARM + args.steps else None
        opt.step()
        end = clock.now()
        called.zero_grad()
        if apart is not None:
            steps.append(end - apart)
        elif step >= WARM:
            whole.append(end - begin)
    sketches = (opt.traffic.bytes - sent) // (2 * args.steps) if isinstance(opt, MoFaSGD) else 0
    reduced, gathered = engine_bytes(method, model, opt)
    peak = clock.peak()
    last = loss.item()
    del called, model, blocks, opt, loss
    clock.reset()
    return {
        "model": name,
        "parameters": numbers,
        "method": method,
        "ranks": distributed.get_world_size(),
        "batch": batch,
        "sequence": length,
        "seconds": statistics.median(whole),
        "spread": (max(whole) - min(whole)) / statistics.median(whole),
        "optimizer_seconds": statistics.median(steps),
        "tokens_per_second": distributed.get_world_size() * batch * length / statistics.median(whole),
        "sketch_bytes": sketches,
        "engine_bytes": reduced,
        "gathered_bytes": gathered,
        "sketches_alone_seconds": alone(sketches, device, clock) if sketches else 0.0,
        "engine_alone_seconds": alone(reduced, device, clock) if reduced else 0.0,
        "peak_gib": peak,
        "loss": last,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=("gpt", "llama"), default=["gpt", "llama"])
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--backend", choices=("nccl", "gloo"))
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each kind, after six others")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.rank = min(args.rank, 4) if args.tiny else args.rank
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device(args.device, local) if args.device == "cuda" else torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = args.backend or ("nccl" if device.type == "cuda" else "gloo")
    distributed.init_process_group(backend, timeout=timedelta(seconds=300))
    # gloo has no collectives of FSDP2's for GPU tensors.
    ddp_only = backend == "gloo" and device.type == "cuda"
    methods = args.methods or [m for m in METHODS if m.startswith("ddp") or not ddp_only]
    run = {"environment": environment(device), "backend": backend, "world": distributed.get_world_size(), "rows": []}
    run |= {"rank": args.rank, "seed": 0, "nccl": list(torch.cuda.nccl.version()) if backend == "nccl" else None}
    before = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    for name in args.models:
        for method in methods:
            row = measure(name, method, args, device)
            run["rows"].append(row)
            if distributed.get_rank() == 0:
                print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                args.out.write_text(json.dumps({"runs": [*before, run]}, indent=1))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
