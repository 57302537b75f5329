"""TRL's SFTTrainer (and RewardTrainer), which take the arguments as transformers' Trainer does."""

import sys

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import mofasgd.hf

model, data, lr = sys.argv[1], sys.argv[2], float(sys.argv[3])
args = SFTConfig(output_dir="out", max_length=1024)
trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=load_dataset(data, split="train"),
    **mofasgd.hf.trainer_kwargs(args, rank=32, lr=lr),
)
trainer.train()
