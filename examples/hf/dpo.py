"""TRL's DPOTrainer; GRPO, KTO, RLOO and transformers' Seq2SeqTrainer alike.

The optimizer is given as an attribute, the callbacks as an argument.
"""

import sys

from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

import mofasgd.hf

model, data, lr = sys.argv[1], sys.argv[2], float(sys.argv[3])
args = DPOConfig(output_dir="out")
kwargs = mofasgd.hf.trainer_kwargs(args, rank=32, lr=lr)
trainer = DPOTrainer(
    model=model,
    args=args,
    train_dataset=load_dataset(data, split="train"),
    callbacks=kwargs["callbacks"],
)
# Without this line the callback raises when training begins.
trainer.optimizer_cls_and_kwargs = kwargs["optimizer_cls_and_kwargs"]
trainer.train()
