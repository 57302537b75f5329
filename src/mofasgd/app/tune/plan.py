"""`mofasgd plan`: what training would take of a GPU's memory, by method, before anything is loaded."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from mofasgd.app.display import Display
from mofasgd.app.tune.config import PlanConfig
from mofasgd.app.tune.methods import METHODS
from mofasgd.app.tune.models import load_config
from mofasgd.app.tune.training import begin_run
from mofasgd.memory import MemoryPlan, estimate, largest_batch, settings_of
from mofasgd.options import check_choice

_GB = 2**30
_PARTS = {
    "weights": "weights",
    "optimizer_state": "state",
    "gradients": "grads",
    "sketches": "sketches",
    "activations": "activ.",
    "temporaries": "temp.",
}
_SETTINGS = ("rank", "attach", "complement", "factor", "freeze")


def chosen(config: PlanConfig) -> dict[str, dict[str, Any]]:
    """Return the settings of each method that `config` names: of those given, the ones that it has.

    Raises:
        ValueError: for an unknown method, or a setting that none of them has.
    """
    names = list(METHODS) if config.methods == "all" else [name.strip() for name in config.methods.split(",")]
    for name in names:
        check_choice("method", name, tuple(METHODS))
    given = {key: value for key in _SETTINGS if (value := getattr(config, key)) is not None}
    for key, value in given.items():
        if not any(key in settings_of(name) for name in names):
            raise ValueError(f"{key}={value!r} has no effect for methods={config.methods}")
    return {name: {key: value for key, value in given.items() if key in settings_of(name)} for name in names}


class _Plans:
    """The plans of one method by batch, each made once."""

    def __init__(self, config: PlanConfig, architecture: Any, method: str, settings: dict[str, Any]) -> None:
        self.config, self.architecture, self.method, self.settings = config, architecture, method, settings
        self._known: dict[int, MemoryPlan] = {}

    def of(self, batch: int) -> MemoryPlan:
        """Return the plan of a batch."""
        config = self.config
        if batch not in self._known:
            self._known[batch] = estimate(
                self.architecture,
                self.method,
                batch=batch,
                seq=config.context,
                checkpointing=config.gradient_checkpointing,
                precision=config.precision,
                accumulate=config.accumulate,
                **self.settings,
            )
        return self._known[batch]

    def total(self, batch: int) -> int:
        """Return the bytes of a batch."""
        return self.of(batch).total


def found(config: PlanConfig) -> dict[str, Any]:
    """Return what `--json` prints: what was asked, and the plan of each method, with gpu_gb also what fits."""
    methods = chosen(config)
    architecture = load_config(config.model)
    asked = ("model", "batch_size", "context", "accumulate", "gradient_checkpointing", "precision", "gpu_gb")
    rows = {}
    for method, settings in methods.items():
        plans = _Plans(config, architecture, method, settings)
        row = rows[method] = {**plans.of(config.batch_size).as_dict(), "settings": settings}
        if config.gpu_gb is not None:
            limit = int((config.gpu_gb - config.reserve_gb) * _GB)
            row["fits"] = row["total"] <= limit
            row["largest_batch"] = largest_batch(plans.total, limit)
    return {**{key: getattr(config, key) for key in asked}, "methods": rows}


def shown(result: dict[str, Any]) -> Table:
    """Return the table of what `found` returned."""
    gpu = result["gpu_gb"]
    more = () if gpu is None else ("fits", "batch <=")
    out = Table("GB", *_PARTS.values(), "peak", *more, box=None, padding=(0, 1, 0, 0))
    for method, row in result["methods"].items():
        sizes = [f"{row[part] / _GB:,.2f}" for part in (*_PARTS, "total")]
        fits = () if gpu is None else ("yes" if row["fits"] else "no", str(row["largest_batch"]))
        out.add_row(method, *sizes, *fits)
    for column in out.columns:
        column.no_wrap = True
    for column in out.columns[1:]:
        column.justify = "right"
    return out


def plan(config: PlanConfig) -> None:
    """Print the table of `config`, or JSON."""
    begin_run()
    result = found(config)
    display = Display()
    if config.json:
        display.console.print(json.dumps(result, indent=1), markup=False)
        return
    display.console.print(shown(result))
    display.note(
        "GB of 2^30 bytes; of each part the most; peak: the most of all together. Not in it: what kernels need within, "
        "CUDA's context, fragments of the allocator (docs/finetuning.md)"
    )
    if config.gpu_gb is not None:
        display.note(f"fits: within {config.gpu_gb:g} GB less {config.reserve_gb:g} GB; batch: the largest that does")
