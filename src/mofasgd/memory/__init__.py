"""Where the memory of training goes."""

from mofasgd.memory.draw import draw, summary
from mofasgd.memory.record import CATEGORIES, Recorder, Timeline

__all__ = ["CATEGORIES", "Recorder", "Timeline", "draw", "summary"]
