"""One of two processes of tests/test_hf_ranks.py: trains under DDP, writes what came out."""

import gc
import runpy
import sys
from pathlib import Path

import torch
from hf_case import arguments, logged, make, trainer_of

import mofasgd.attach

torch.set_num_threads(1)
path = Path(sys.argv[1])
args = arguments(path, max_steps=6, gradient_accumulation_steps=2, ddp_backend="gloo")
found = {}
for attach in ("auto", "none"):
    model = make("bert")
    trainer = trainer_of(model, args, attach=attach)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    norms = logged(trainer)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    again = logged(trainer)
    sent = trainer.optimizer.optimizer.traffic.bytes
    del trainer
    gc.collect()
    mofasgd.attach.detach(model)
    found[attach] = (weights, norms, again, model.state_dict(), sent)


made = []


class Kept(mofasgd.MoFaSGD):
    """The optimizer that the example makes."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        made.append(self)


mofasgd.MoFaSGD = Kept
example = Path(__file__).parents[1] / "examples" / "hf" / "accelerate_loop.py"
losses = runpy.run_path(str(example))["main"](steps=10)
found["example"] = (losses, made[0].traffic.bytes)
torch.save(found, path / f"rank{args.process_index}.pt")
