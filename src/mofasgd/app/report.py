"""Table, picture and one-line reading of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mofasgd.app.record import read_metrics

Row = dict[str, Any]


def by_loss(row: Row) -> tuple[bool, float]:
    """Sort key: the lowest loss first, diverged rows last."""
    loss = row["validation_loss"]
    return loss is None, 0.0 if loss is None else loss


def _loss(row: Row) -> str:
    if row["validation_loss"] is None:
        return "diverged"
    spread = "" if row["std"] is None else f" ± {row['std']:.4f}"
    return f"{row['validation_loss']:.4f}{spread}"


def table(rows: Sequence[Row]) -> Table:
    """Return the rows (of `mofasgd.app.compare`) as a table, the lowest loss first; without times if any is unknown."""
    alone = all(row["ms_per_step"] is not None for row in rows if row["validation_loss"] is not None)
    # Short enough for 80 columns.
    out = Table("optimizer", "lr", "val. loss", "gradients", "state", *(["ms/step"] if alone else []))
    out.columns[0].no_wrap = True
    for column in out.columns[1:]:
        column.justify = "right"
    for row in sorted(rows, key=by_loss):
        cells = [row["label"], f"{row['lr']:g}{'*' if row['edge'] else ''}", _loss(row)]
        numbers = [
            ("gradients_mb", ".2f", " MB"),
            ("optimizer_state_mb", ".2f", " MB"),
            *([("ms_per_step", ".0f", "")] if alone else []),
        ]
        cells += ["-" if row[key] is None else f"{row[key]:{form}}{unit}" for key, form, unit in numbers]
        out.add_row(*cells)
    if any(row["edge"] for row in rows):
        out.caption = "* at the end of the learning rates that were tried"
    return out


def reading(rows: Sequence[Row]) -> str:
    """Return one line: every MoFaSGD row against AdamW, or the best row if there is no AdamW."""
    finished = sorted((row for row in rows if row["validation_loss"] is not None), key=by_loss)
    diverged = [row["label"] for row in rows if row["validation_loss"] is None]
    adamw = next((row for row in finished if row["method"] == "adamw"), None)
    if not finished:
        return "Every run diverged."
    parts = [f"{finished[0]['label']} ends lowest at {finished[0]['validation_loss']:.3f}"]
    if adamw is not None:
        parts.append(f"AdamW at {adamw['validation_loss']:.3f} with {adamw['optimizer_state_mb']:.2f} MB of state")
        for row in (row for row in finished if row["method"] == "mofasgd"):
            difference = row["validation_loss"] - adamw["validation_loss"]
            share = row["optimizer_state_mb"] / adamw["optimizer_state_mb"]
            side = "below" if difference < 0 else "above"
            parts.append(f"{row['label']} {abs(difference):.3f} {side} AdamW with {share:.0%} of its state")
    return "; ".join([*parts, *(f"{label} diverged" for label in diverged)]) + "."


def _label(row: Row) -> str:
    return f"{row['label']} (lr {row['lr']:g})"


def draw(rows: Sequence[Row], folder: Path, path: Path) -> bool:
    """Draw loss curves and memory bars of the rows that did not diverge into `path` (PNG).

    Run folders lie in `folder`. Returns whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["validation_loss"] is not None]
    if not rows:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2), layout="constrained")
    colors = {row["label"]: f"C{i}" for i, row in enumerate(rows)}
    ends: list[float] = []
    for row in sorted(rows, key=by_loss):
        metrics = folder / row["folder"] / "metrics.jsonl"
        if not metrics.exists():
            continue  # the result is in results.json even if somebody made room
        lines = [line for line in read_metrics(metrics) if "validation_loss" in line]
        losses = [line["validation_loss"] for line in lines]
        ends += losses[len(losses) // 4 :]
        left.plot([line["tokens"] / 1e6 for line in lines], losses, ".-", color=colors[row["label"]], label=_label(row))
    if ends:
        low, high = min(ends), max(ends)
        # The first evaluations would press everything that matters into a corner.
        left.set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.15 * (high - low) + 0.01)
    left.set(
        xlabel="training tokens (millions)",
        ylabel="validation loss (nats per token)",
        title="The same GPT on the same tokens",
    )
    left.grid(alpha=0.3)
    left.legend()

    names = [row["label"] for row in rows][::-1]
    weights = [row["weights_mb"] for row in rows][::-1]
    gradients = [row["gradients_mb"] or 0.0 for row in rows][::-1]
    state = [row["optimizer_state_mb"] for row in rows][::-1]
    both = [w + g for w, g in zip(weights, gradients, strict=True)]
    right.barh(names, weights, color="0.7", label="weights")
    right.barh(names, gradients, left=weights, color="0.85", label="gradients or sketches held")
    bars = right.barh(names, state, left=both, color=[colors[name] for name in names])
    right.bar_label(bars, [f" {g:.1f} + {s:.1f} MB" for g, s in zip(gradients, state, strict=True)])
    right.set_xlim(0, 1.4 * max(b + s for b, s in zip(both, state, strict=True)))
    right.set(xlabel="MB (weights, gradients + optimizer state)", title="Memory beside activations")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
