"""One of two processes of tests/test_hf_ranks.py: trains under DDP, writes what came out."""

import sys
from pathlib import Path

import torch
from hf_case import arguments, logged, make, trainer_of

torch.set_num_threads(1)
path = Path(sys.argv[1])
args = arguments(path, max_steps=6, gradient_accumulation_steps=2, ddp_backend="gloo")
try:
    trainer_of(make("bert"), args).train()
    refused = "not refused"
except ValueError as error:
    refused = str(error)
model = make("bert")
trainer = trainer_of(model, args, attach="none")
trainer.train()
assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
torch.save((refused, model.state_dict(), logged(trainer)), path / f"rank{args.process_index}.pt")
