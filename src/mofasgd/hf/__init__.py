"""MoFaSGD in Hugging Face's Trainer, and in what is built on it (TRL, Axolotl).

trainer = Trainer(model, args, ..., **mofasgd.hf.trainer_kwargs(args, rank=32, lr=...))
"""

from mofasgd.hf.callback import MoFaSGDCallback
from mofasgd.hf.factory import OptimizerFactory, trainer_kwargs

__all__ = ["MoFaSGDCallback", "OptimizerFactory", "trainer_kwargs"]
