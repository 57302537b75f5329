"""`mofasgd profile`: where the memory of fine-tuning goes."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from trl import SFTConfig

from mofasgd.app.display import Display
from mofasgd.app.files import locked
from mofasgd.app.tune.config import ProfileConfig
from mofasgd.app.tune.encode import Example
from mofasgd.app.tune.methods import resolve
from mofasgd.app.tune.models import check_room, load_tokenizer
from mofasgd.app.tune.recording import MemoryProfile
from mofasgd.app.tune.training import begin_run, ready, step_arguments
from mofasgd.app.tune.tuner import tuner


def shown(found: dict[str, Any]) -> Table:
    """Return the content of memory.json as a table."""
    out = Table("MB (10^6 bytes)", "at the peak", "at most")
    for category, held in found["at_peak_mb"].items():
        out.add_row(category, f"{held:,.1f}", f"{found['most_mb'][category]:,.1f}")
    out.add_row("all tensors", f"{found['peak_mb']:,.1f}", "")
    if "allocator_peak_mb" in found:
        out.add_row("all that the allocator gave", f"{found['allocator_peak_mb']:,.1f}", "")
        out.add_row("all that it reserved", f"{found['reserved_peak_mb']:,.1f}", "")
    for column in out.columns[1:]:
        column.justify = "right"
    return out


def profile(config: ProfileConfig) -> None:
    """Take the steps of `config`, write memory.png and memory.json, and show the table."""
    begin_run()
    settings, tokenizer = resolve(config), load_tokenizer(config.model)
    tokens = torch.randint(
        len(tokenizer),
        (config.steps * config.batch_size, config.context),
        generator=torch.Generator().manual_seed(config.seed),
    )
    rows = [Example(row, row, [], "") for row in tokens.tolist()]
    with locked(config.out, "out"):
        arguments = step_arguments(config, settings, config.seed, str(config.out / "trainer"))
        args = SFTConfig(**arguments, max_length=None, max_steps=config.steps, logging_strategy="no")
        trainer = tuner(config, args, settings, tokenizer, rows)
        check_room(trainer.model, config.context, "context", config.context)
        ready(trainer, 0.0, 0.0)
        title = f"{config.method}: {config.batch_size} x {config.context} tokens"
        recorded = MemoryProfile(config.steps, config.out, title)
        trainer.add_callback(recorded)
        trainer.train()
    assert recorded.found is not None
    display = Display()
    display.console.print(shown(recorded.found))
    display.note(f"{config.out / 'memory.png'} shows it over time, {config.out / 'memory.json'} has the numbers")
