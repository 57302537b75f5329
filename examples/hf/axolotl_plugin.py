"""Axolotl: put this file on PYTHONPATH and `plugins: [axolotl_plugin.MoFaSGDPlugin]` into the YAML file.

Its `optimizer:` stays `adamw_torch` or `adamw_torch_fused`; this plugin replaces what it names.
"""

from axolotl.integrations.base import BasePlugin

import mofasgd.hf

RANK, LR = 32, 0.02


class MoFaSGDPlugin(BasePlugin):
    """Gives the trainer its optimizer after Axolotl has built it."""

    def post_trainer_create(self, cfg, trainer):
        """Set what Axolotl's create_optimizer will call."""
        kwargs = mofasgd.hf.trainer_kwargs(trainer.args, rank=RANK, lr=LR)
        trainer.optimizer_cls_and_kwargs = kwargs["optimizer_cls_and_kwargs"]
        # In front: the reporters behind them are then shown the optimizer's norm.
        trainer.callback_handler.callbacks[:0] = kwargs["callbacks"]
