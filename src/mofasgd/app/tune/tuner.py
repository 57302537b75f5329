"""TRL's SFTTrainer with a model as its method trains it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTTrainer

from mofasgd.app.config import Settings
from mofasgd.app.tune.config import StepConfig
from mofasgd.app.tune.encode import Example
from mofasgd.app.tune.methods import kwargs_for_trainer
from mofasgd.app.tune.models import load_model, prepare
from mofasgd.app.tune.store import reported
from mofasgd.app.tune.training import Scheduled


class Tuner(Scheduled, SFTTrainer):
    """TRL's SFTTrainer with the schedule of `mofasgd pretrain`, and checkpoints that are whole or not there."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with reported(folder):
                super()._save_checkpoint(*args, **kwargs)
        finally:
            if not (folder / "trainer_state.json").exists():  # the last file that is written
                shutil.rmtree(folder, ignore_errors=True)


def tuner(config: StepConfig, args: Any, settings: Settings, tokenizer: Any, rows: Sequence[Example]) -> Tuner:
    """Return a trainer of `config.model`, on its device.

    Args:
        config: model, method and precision.
        args: its SFTConfig.
        settings: of the method.
        tokenizer: of the model.
        rows: to train on.

    Raises:
        ValueError: if the model cannot be loaded or the method cannot train it.
    """
    set_seed(args.seed)
    model: Any = load_model(config.model, AutoModelForCausalLM, config.precision)
    model = prepare(model, config.method, settings, "CAUSAL_LM").to(args.device)
    data = Dataset.from_dict({"input_ids": [e.input_ids for e in rows], "labels": [e.labels for e in rows]})
    kwargs = kwargs_for_trainer(args, config.method, settings)
    return Tuner(model=model, args=args, train_dataset=data, processing_class=tokenizer, **kwargs)
