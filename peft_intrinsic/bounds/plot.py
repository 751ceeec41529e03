"""A sweep of certificates as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_sweep(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bound, training error and test error: the least bound of each d against d, and every one against its bytes.

    Args:
        rows: of `sweep`.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    def bound(row: dict[str, Any]) -> float:
        return row["certificate"]["bound"]

    dims = sorted({row["d"] for row in rows})
    best = [min((row for row in rows if row["d"] == d), key=bound) for d in dims]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, shown, name, style in ((left, best, "d", "o-"), (right, rows, "bytes", "o")):
        place = [row[name] for row in shown]
        axis.plot(place, [bound(row) for row in shown], style, color="black", label="certificate")
        axis.plot(place, [row["certificate"]["risk"] for row in shown], style, color="grey", label="training error")
        if all(row["certificate"]["test_n"] for row in shown):
            test = [row["certificate"]["test_errors"] / row["certificate"]["test_n"] for row in shown]
            axis.plot(place, test, style, color="tab:blue", label="test error")
        majority = shown[0]["certificate"]["majority"] / shown[0]["certificate"]["n"]
        axis.axhline(majority, color="grey", linestyle=":", label="majority class")
        axis.set(xscale="log", xlabel="trained numbers" if name == "d" else "bytes of the packed adapter")
    left.set(ylabel="error", ylim=(0, None))
    left.legend()
    figure.savefig(path, dpi=150)
