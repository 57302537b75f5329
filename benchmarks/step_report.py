"""What `step_time.py` shows: ratios, a table, a plot."""


def compare(rows):
    """Add to each row its ratios to AdamW, by medians, by the fastest steps and by processor time."""
    for how in ("fused", "foreach"):
        base = next((row for row in rows if row["column"] == f"adamw {how}"), None)
        for row in rows if base else ():
            if "median_ms" in row:
                row[f"ratio_{how}"] = row["median_ms"] / base["median_ms"]
                row[f"ratio_{how}_min"] = row["min_ms"] / base["min_ms"]
                row[f"ratio_{how}_cpu"] = row["cpu_ms"] / base["cpu_ms"]


def table(rows, floors):
    keys = {
        "median_ms": "median ms",
        "min_ms": "min ms",
        "cpu_ms": "cpu ms",
        "first_ms": "first ms",
        "ratio_fused": "/fused",
        "ratio_foreach": "/foreach",
        "ratio_foreach_min": "/foreach, min",
        "ratio_foreach_cpu": "/foreach, cpu",
        "ratio_floor": "/floor",
        "peak_bytes": "peak MiB",
    }

    def cell(key, value):
        if value is None:
            return "-"
        return f"{value / 2**20:.1f}" if key == "peak_bytes" else f"{value:.3f}"

    lines = [f"{'column':28s} {'rank':>4s}" + "".join(f"{title:>14s}" for title in keys.values())]
    for row in rows:
        cells = row.get("error") or "".join(f"{cell(key, row.get(key)):>14s}" for key in keys)
        lines.append(f"{row['column']:28s} {row['rank'] or '':>4}{cells}")
    lines += [f"{'floor, ' + name:28s} {'':>4s}{floor['ms']:14.3f}" for name, floor in floors.items()]
    return "\n".join(lines)


def plot(result, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, floors = [r for r in result["rows"] if "ratio_fused" in r], result["floors"]
    base = next((row["median_ms"] for row in rows if row["column"] == "adamw fused"), None)
    if base is None:
        return
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    names = list(dict.fromkeys(row["column"] for row in rows))
    for number, name in enumerate(names):
        points = [(row["rank"], row["ratio_fused"]) for row in rows if row["column"] == name]
        color = f"C{number % 10}"
        if points[0][0] is None:
            axes.axhline(points[0][1], color=color, label=name)
        else:
            axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=name)
    for style, name in zip(("--", ":", "-."), ("dense", "after sketch", "complement"), strict=True):
        axes.axhline(floors[name]["ms"] / base, color="black", linewidth=1, linestyle=style, label=f"floor, {name}")
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="time of a step / fused AdamW's")
    axes.set_xticks(result["ranks"], [str(r) for r in result["ranks"]])
    axes.set_xticks([], minor=True)
    axes.set_title(
        f"{result['model']}, {result['layers']} layers, {result['dtype']}, {result['environment']['device']}"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)
