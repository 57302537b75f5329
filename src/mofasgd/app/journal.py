"""A run folder's records: config.yaml, run.json, metrics.jsonl and where else metrics go. One rank keeps them."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any

import yaml

from mofasgd.app.config import PretrainConfig
from mofasgd.app.files import read_json, write_json, write_text
from mofasgd.app.identity import identity, plain
from mofasgd.app.record import JsonLines, Sink, TensorBoard, WandB, environment, read_metrics
from mofasgd.app.trainer import Trainer


class Journal:
    """Takes what happens in one start of `mofasgd pretrain`; lines of steps that will be taken again are dropped."""

    def __init__(self, config: PretrainConfig, trainer: Trainer) -> None:
        self.config, self.out = config, config.out
        self.record = self._new_record(trainer)
        self.metrics = JsonLines(self.out / "metrics.jsonl", trainer.step)
        self.sinks: list[Sink] = [self.metrics]
        if config.tensorboard:
            self.sinks.append(TensorBoard(self.out, trainer.step))
        if config.wandb:
            self.sinks.append(WandB(config.wandb, self.out, self.record["id"], plain(config)))
        text = yaml.safe_dump(plain(dataclasses.replace(config, resume=False)), sort_keys=False)
        path = self.out / "config.yaml"
        if not path.exists() or path.read_text() != text:
            write_text(path, text)
        self._write_record()

    def _new_record(self, trainer: Trainer) -> dict[str, Any]:
        """Return the content of run.json; a resumed run keeps its id and tells of all its sessions."""
        path = self.out / "run.json"
        earlier = read_json(path) if trainer.step and path.exists() else {}
        session = {"from_step": trainer.step, "ranks": trainer.ranks.world, **environment(trainer.device)}
        return {
            "id": earlier.get("id", uuid.uuid4().hex[:16]),
            "config": plain(self.config),
            "identity": identity(self.config),
            "optimizer_settings": trainer.settings,
            "seeds": {"weights, data and rounding": self.config.seed},
            "data": {
                "sha256": trainer.fingerprint,
                "training_tokens": trainer.train_tokens,
                "validation_tokens": sum(map(len, trainer.validation)),
            },
            "model": {
                "parameters": sum(p.numel() for p in trainer.model.parameters()),
                "megabytes": sum(p.nbytes for p in trainer.model.parameters()) / 1e6,
                "vocab": trainer.vocab_size,
            },
            "sessions": [*earlier.get("sessions", []), session],
        }

    def _write_record(self) -> None:
        write_json(self.out / "run.json", self.record)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Hand metrics to all that take them."""
        for sink in self.sinks:
            sink.write(step, metrics)

    def validation_losses(self) -> dict[int, float]:
        """Return the validation losses that have been written, by step."""
        lines = read_metrics(self.metrics.path)
        return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Add the result to run.json; return it with the best validation loss."""
        result = {**result, "best_validation_loss": min(self.validation_losses().values())}
        self.record["result"] = result
        self._write_record()
        return result

    def close(self) -> None:
        """Close the metric files."""
        for sink in self.sinks:
            sink.close()
