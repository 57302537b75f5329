"""What all fine-tuning shares: TrainingArguments, the schedule, and the model as its method trains it."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback

from mofasgd.app.config import Settings
from mofasgd.app.schedule import lr_multiplier
from mofasgd.app.tune.config import StepConfig, TuneConfig
from mofasgd.app.tune.methods import arguments


class Scheduled:
    """For a Trainer: warm-up, stable, linear cooldown, as `mofasgd pretrain` has them.

    Attributes:
        shares: warm-up and cooldown as shares of the steps; set before training.
    """

    shares: tuple[float, float]
    optimizer: Any
    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Set up the scheduler of the trainer."""
        warmup, cooldown = self.shares
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: lr_multiplier(step, num_training_steps, warmup, cooldown),
            )
        found: LambdaLR = self.lr_scheduler
        return found


def bf16(config: StepConfig) -> bool:
    """Whether products are made in bfloat16 by autocast."""
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    return config.precision == "bf16-mixed" or (config.precision == "auto" and not cpu)


def step_arguments(config: StepConfig, settings: Settings, seed: int, folder: str) -> dict[str, Any]:
    """Return the arguments of TrainingArguments, or of what is derived from it, for a step."""
    micro = config.micro_batch_size or config.batch_size
    if settings.get("complement") and settings["attach"] == "release" and micro < config.batch_size:
        raise ValueError(
            f"micro_batch_size={micro} sums the gradients of a step, which attach=release with a complement does not "
            f"keep: leave it out, lower batch_size={config.batch_size}, or add --attach none"
        )
    return {
        "output_dir": folder,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": config.batch_size // micro,
        "learning_rate": settings.get("adamw_lr", settings["lr"]),
        **arguments(settings),
        # A loss that is not finite has to be seen, not replaced.
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "bf16": bf16(config),
        "gradient_checkpointing": config.gradient_checkpointing,
        "dataloader_pin_memory": torch.cuda.is_available() and config.device != "cpu",
        "use_cpu": config.device == "cpu",
    }


def training_arguments(config: TuneConfig, settings: Settings, seed: int, folder: str) -> dict[str, Any]:
    """Return the arguments of TrainingArguments for a whole run."""
    length = {"num_train_epochs": config.epochs, "max_steps": config.steps or -1, "logging_steps": config.log_every}
    return {**step_arguments(config, settings, seed, folder), **length}


def ready(trainer: Any, warmup: float, cooldown: float) -> None:
    """Set what a trainer's constructor does not take."""
    trainer.shares = (warmup, cooldown)
    trainer.remove_callback(PrinterCallback)


def sizes(model: nn.Module) -> dict[str, Any]:
    """Return how large a model is, for a run's record."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "megabytes": sum(p.nbytes for p in parameters) / 1e6,
    }


def begin_run() -> None:
    """Free what an earlier run of this process has left, and keep what transformers and TRL say to errors."""
    # Trainers are cycles, and the peak memory of a run is its own.
    gc.collect()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Renamings in newer versions of these two, whose older versions have the old names only.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\b")
