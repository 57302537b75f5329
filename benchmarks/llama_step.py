"""Peak memory and tokens/s of whole training steps of a Llama with random bf16 weights: attached MoFaSGD, LoRA, AdamW.

python benchmarks/llama_step.py --out docs/results/llama_step.json          Llama-3.1-8B shapes, one 80 GB GPU or more
python benchmarks/llama_step.py --tiny --out /tmp/tiny.json                 seconds on a CPU, to try the script

All rows run in one process on the same model and the same tokens. "frozen" is the floor: forward and the backward of
activations, no weight gradient and no step. Embeddings and head are frozen except in the rows that say otherwise; the
blocks' norms are trained by AdamW, as everywhere but in LoRA, which leaves them alone: "norms frozen" is its scope.
LoRA is PEFT's on all linear layers of the blocks, with bf16 adapters and fused AdamW.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from device import Device
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from mofasgd import MoFaSGD, param_groups  # noqa: E402
from mofasgd.app.record import environment  # noqa: E402

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
# batch, sequence, activation checkpointing
SETTINGS = [(1, 1024, True), (1, 1024, False), (4, 2048, True), (2, 2048, False)]
METHODS = {
    "frozen": {},
    "mofasgd r8": {"rank": 8},
    "mofasgd r8, norms frozen": {"rank": 8, "norms": False},
    "mofasgd r32": {"rank": 32},
    "mofasgd r128": {"rank": 128},
    "lora r8": {"rank": 8},
    "adamw": {},
    "mofasgd r8, embeddings and head": {"rank": 8, "outer": True},
    "lora r8, embeddings and head": {"rank": 8, "outer": True},
    "adamw, embeddings and head": {"outer": True},
}
PEERS = ("frozen", "lora r8", "adamw")
OUTER = ("embed_tokens", "lm_head")


def freeze(model, trained=True, norms=True, outer=False):
    """Freeze what is not `trained`: the blocks; their norms; `outer`, embeddings and head."""
    for name, param in model.named_parameters():
        part = outer if any(key in name for key in OUTER) else norms or "norm" not in name
        param.requires_grad_(trained and part)


def start(method, model):
    """Return (model to call, optimizer or None, function that undoes it all)."""
    options = METHODS[method]
    outer = options.get("outer", False)
    if method == "frozen":
        freeze(model, trained=False)
        return model, None, lambda: None
    if method.startswith("mofasgd"):
        freeze(model, norms=options.get("norms", True), outer=outer)
        forced = {"factor": [f"*{key}.weight" for key in OUTER]} if outer else {}
        optimizer = MoFaSGD(param_groups(model, rank=options["rank"], lr=1e-5, **forced))
        handle = optimizer.attach(model)
        return model, optimizer, handle.detach
    if method.startswith("lora"):
        return lora(model, options["rank"], outer)
    freeze(model, outer=outer)
    weights = [param for param in model.parameters() if param.requires_grad]
    return model, torch.optim.AdamW(weights, lr=1e-5, fused=True), lambda: None


def lora(model, rank, outer):
    """Return what `start` does, for PEFT's LoRA; `outer`: with embeddings and head trained in full."""
    from peft import LoraConfig, get_peft_model

    freeze(model, trained=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    saved = list(OUTER) if outer else None
    config = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", modules_to_save=saved)
    wrapped = get_peft_model(model, config)

    def undo():
        wrapped.unload()
        # PEFT leaves its trained copies in their place.
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(head)

    trained = [param for param in wrapped.parameters() if param.requires_grad]
    for param in trained:
        param.data = param.data.to(torch.bfloat16)
    return wrapped, torch.optim.AdamW(trained, lr=1e-5, fused=True), undo


def measure(method, model, setting, args, device):
    """Return one row; steps 1 and 2 are the first window and the warm-up, the others are timed one by one."""
    batch, length, checkpointing = setting
    clock = Device(device)
    called, optimizer, undo = start(method, model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    model.train()
    # The floor needs a gradient that flows through all layers though no weight asks for one.
    embed = model.get_input_embeddings()
    hook = embed.register_forward_hook(lambda _m, _i, out: out.requires_grad_()) if method == "frozen" else None
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(device)
    seconds, peaks, losses = [], [], []
    clock.reset()
    try:
        for step in range(2 + args.steps):
            begin = clock.now()
            loss = called(input_ids=tokens, labels=tokens).loss
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            seconds.append(clock.now() - begin)
            losses.append(loss.item())
            if step == 0:
                peaks.append(clock.peak())
                if clock.cuda:
                    torch.cuda.reset_peak_memory_stats()
        peaks.append(clock.peak())
        if losses[-1] != losses[-1]:
            raise RuntimeError(f"{method}: the loss is NaN")
    finally:
        if hook is not None:
            hook.remove()
        undo()
        for param in model.parameters():
            param.grad = None
        del called, optimizer
        clock.reset()
    timed = seconds[2:]
    return {
        "method": method,
        "batch": batch,
        "sequence": length,
        "checkpointing": checkpointing,
        "tokens_per_second": batch * length / statistics.median(timed),
        "spread": (max(timed) - min(timed)) / statistics.median(timed),
        "first_step_ratio": seconds[0] / statistics.median(timed),
        "first_step_peak_gib": peaks[0],
        "peak_gib": peaks[1],
        "losses": [losses[0], losses[-1]],
    }


def compare(rows):
    """Add to each row its ratios to the rows of the same setting; of those that train embeddings, to their like."""
    for row in rows:
        same = {r["method"]: r for r in rows if all(r[k] == row[k] for k in ("batch", "sequence", "checkpointing"))}
        for other in PEERS:
            like = (
                f"{other}, embeddings and head" if "outer" in METHODS[row["method"]] and other in PEERS[1:] else other
            )
            if "tokens_per_second" in row and "tokens_per_second" in same.get(like, {}):
                row[f"speed_to_{other}"] = row["tokens_per_second"] / same[like]["tokens_per_second"]
                row[f"memory_to_{other}"] = row["peak_gib"] and row["peak_gib"] / same[like]["peak_gib"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each row, after two others")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    begin = time.perf_counter()
    device = torch.device(args.device)
    shape = dict(TINY if args.tiny else SHAPE, max_position_embeddings=4096, tie_word_embeddings=False)
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft")}
    rows = []
    result = {"environment": environment(device), "libraries": versions, "shape": shape, "seed": 0, "rows": rows}
    settings = [(b, 32, c) for b, _, c in SETTINGS] if args.tiny else SETTINGS
    for method in args.methods:
        for setting in settings:
            try:
                row = measure(method, model, setting, args, device)
            except torch.cuda.OutOfMemoryError:
                names = ("batch", "sequence", "checkpointing")
                row = {"method": method, **dict(zip(names, setting, strict=True)), "out_of_memory": True}
            rows.append(row)
            compare(rows)
            result["seconds"] = time.perf_counter() - begin
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
