"""A recorded timeline as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mofasgd.memory.record import CATEGORIES, Timeline

_COLORS = dict(zip(CATEGORIES, ("0.55", "C0", "C3", "C1", "C2", "0.85"), strict=True))

_BINS = 3000
"""Most moments of a picture; of several that fall into one the fullest is drawn."""


def summary(timeline: Timeline) -> dict[str, Any]:
    """Return, in MB (10^6 bytes), what was alive when most was, by category, and each category's own most."""
    total = timeline.total()
    peak = max(range(len(total)), key=total.__getitem__)
    return {
        "peak_mb": round(total[peak] / 1e6, 3),
        "at_peak_mb": {category: round(held[peak] / 1e6, 3) for category, held in timeline.sizes.items()},
        "most_mb": {category: round(max(held) / 1e6, 3) for category, held in timeline.sizes.items()},
    }


def _moments(timeline: Timeline) -> list[int]:
    """Return the numbers of the events to be drawn."""
    total, count = timeline.total(), len(timeline.times)
    width = -(-count // _BINS)
    return [max(range(i, min(i + width, count)), key=total.__getitem__) for i in range(0, count, width)]


def draw(timeline: Timeline, title: str, path: Path) -> None:
    """Draw the timeline into `path` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found, moments = summary(timeline), _moments(timeline)
    times = [timeline.times[i] for i in moments]
    figure, axes = plt.subplots(figsize=(13, 5.5), layout="constrained")
    lower = [0.0] * len(moments)
    for category, held in timeline.sizes.items():
        upper = [low + held[i] / 1e6 for low, i in zip(lower, moments, strict=True)]
        label = f"{category}: {found['at_peak_mb'][category]:,.1f} MB at the peak"
        axes.fill_between(times, lower, upper, step="post", color=_COLORS[category], label=label, linewidth=0)
        lower = upper
    for number, (begin, end) in enumerate(timeline.steps, 1):
        axes.axvspan(begin, end, color="k", alpha=0.08, linewidth=0)
        axes.annotate(f"step {number}", ((begin + end) / 2, 1.0), xycoords=("data", "axes fraction"), ha="center")
    axes.axhline(found["peak_mb"], color="k", linewidth=0.6, linestyle=":")
    axes.set(xlabel="seconds, slowed by recording (shaded: the optimizer's steps)", ylabel="MB", title=f"{title}\n")
    axes.set_ylim(0, 1.02 * found["peak_mb"])
    axes.margins(x=0)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)
