"""Where the memory of training goes, and would go."""

from mofasgd.memory.draw import draw, summary
from mofasgd.memory.methods import settings_of
from mofasgd.memory.plan import MemoryPlan, estimate, largest_batch
from mofasgd.memory.record import CATEGORIES, Recorder, Timeline

__all__ = [
    "CATEGORIES",
    "MemoryPlan",
    "Recorder",
    "Timeline",
    "draw",
    "estimate",
    "largest_batch",
    "settings_of",
    "summary",
]
