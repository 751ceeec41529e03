"""Plots a sweep of certificates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_sweep(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot bound, training error and test error: against d for the lowest bound of each d, and against bytes for all.

    Args:
        rows: result of `sweep`.
        path: file of the figure; its ending is the format.
    """
    from matplotlib.figure import Figure

    dims = sorted({row["d"] for row in rows})
    best = [min((row for row in rows if row["d"] == d), key=lambda row: row["certificate"]["bound"]) for d in dims]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, shown, name, style in ((left, best, "d", "o-"), (right, rows, "bytes", "o")):
        x, certificates = [row[name] for row in shown], [row["certificate"] for row in shown]
        axis.plot(x, [values["bound"] for values in certificates], style, color="black", label="bound")
        axis.plot(x, [values["risk"] for values in certificates], style, color="gray", label="training error")
        if all(values["test_n"] for values in certificates):
            errors = [values["test_errors"] / values["test_n"] for values in certificates]
            axis.plot(x, errors, style, color="tab:blue", label="test error")
        majority = certificates[0]["majority"] / certificates[0]["n"]
        axis.axhline(majority, color="gray", linestyle=":", label="majority class")
        axis.set(xscale="log", xlabel="trainable parameters (d)" if name == "d" else "bytes of the packed adapter")
    left.set(ylabel="error", ylim=(0, None))
    left.legend()
    figure.savefig(path, dpi=150)
