"""The style of all figures, and how they are saved."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

STYLE = Path(__file__).with_name("figures.mplstyle")
P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that draws a figure, which then has the style of `figures.mplstyle`.

    The function raises ImportError if matplotlib is not installed. The extra `plot` installs it.
    """

    @wraps(draw)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib.style

        with matplotlib.style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return call


def scale_counts(axes: Any) -> None:
    """Make the x-axis logarithmic, with values such as 500 and 2,000 as labels."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.12g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def save_figure(figure: Any, file: Any, suffix: str | None = None) -> None:
    """Save a figure without the date, so that the same figure gives the same bytes.

    Args:
        figure: matplotlib's figure.
        file: a path, whose ending is the format, or an open binary file.
        suffix: the format of an open file.
    """
    suffix = suffix or Path(os.fspath(file)).suffix.removeprefix(".").lower()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    figure.savefig(file, format=suffix, metadata=undated.get(suffix))
