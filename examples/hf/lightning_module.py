"""Lightning: one optimizer for the whole model, so that its automatic optimization stays on.

Leave `gradient_clip_val` of its Trainer unset: attached parameters have no `p.grad` to clip.
"""

import lightning
import torch
from torch import nn

import mofasgd


class Module(lightning.LightningModule):
    """A language model; `net` maps tokens (batch, time) to logits (batch, time, vocabulary)."""

    def __init__(self, net: nn.Module, lr: float, steps: int) -> None:
        super().__init__()
        self.net, self.lr, self.steps = net, lr, steps

    def training_step(self, tokens: torch.Tensor, _: int) -> torch.Tensor:
        """Return the loss of predicting the next token."""
        logits = self.net(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> dict[str, object]:
        """Return the optimizer, attached on one process, and its schedule."""
        groups = mofasgd.param_groups(self.net, rank=32, lr=self.lr)
        opt = mofasgd.MoFaSGD(groups, max_grad_norm=1.0)
        if self.trainer.world_size == 1:
            opt.attach(self.net)
        decline = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=self.steps)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": decline, "interval": "step"}}
