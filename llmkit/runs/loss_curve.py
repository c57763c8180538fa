"""A picture of a run's loss, for a model card or a page of documentation."""

import math
from pathlib import Path

from llmkit.runs.run import Run


def draw_loss(run: Run, path: Path) -> bool:
    """Draw training and validation loss over the steps, on no background, in colours for light and dark pages.

    Returns:
        Whether there was enough to draw.
    """
    from matplotlib.figure import Figure  # not for every run that could be pushed

    lines = {
        "training": [(record["step"], record["loss"]) for record in run.training],
        "validation": [(record["step"], record["eval_loss"]) for record in run.evaluations],
    }
    lines = {name: [point for point in points if math.isfinite(point[1])] for name, points in lines.items()}
    if not any(len(points) > 1 for points in lines.values()):
        return False
    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    grey = "#7d7d7d"  # a contrast of 4.1 to white, and of 4.7 to the Hub's dark pages
    for (name, points), color, marker in zip(lines.items(), ("#3b8ed8", "#d9731a"), (None, "o"), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1.5, label=name)
    axes.set_xlabel("step", color=grey)
    axes.set_ylabel("loss (nats per token)", color=grey)
    axes.tick_params(colors=grey)
    axes.grid(color=grey, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(grey)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(labelcolor=grey, frameon=False)
    figure.savefig(path, transparent=True, metadata={"Software": None})
    return True
