"""`mofasgd export`: the weights of a run as safetensors, which other tools read without torch."""

from __future__ import annotations

import json

from safetensors.torch import save

from mofasgd.app import checkpoint
from mofasgd.app.config import ExportConfig
from mofasgd.app.display import Display
from mofasgd.app.files import replaced


def export(config: ExportConfig) -> None:
    """Write the weights of a run's newest checkpoint as a safetensors file."""
    content = checkpoint.load(config.out / "checkpoints")
    if content is None:
        raise ValueError(f"out={config.out} has no checkpoint: correct --out, or train with --save_last true")
    path = config.to or config.out / "model.safetensors"
    weights = {name: weight.contiguous() for name, weight in content["model"].items()}
    # Of metadata the format takes texts only.
    about = {"format": "pt", "step": str(content["step"]), "mofasgd": json.dumps(content["identity"])}
    with replaced(path) as out:
        out.write(save(weights, about))
    numbers = sum(weight.numel() for weight in weights.values())
    Display().note(f"{path} has the {numbers:,} weights of step {content['step']}")
