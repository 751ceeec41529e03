"""Heat maps of several reports."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from ..figures import save_figure, styled


@styled
def heat_map(cells: Mapping[tuple[str, str], float], label: str, path: str | os.PathLike) -> None:
    """Draw a heat map with a row for each layer and a column for each kind of parameter. Absent cells are white.

    Args:
        cells: values by layer and kind.
        label: label of the color scale.
        path: path of the image to write.
    """
    from matplotlib.figure import Figure

    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, column), value in cells.items():
        values[rows.index(row), columns.index(column)] = value
    figure = Figure(figsize=(2 + 0.35 * len(columns), 3 + 0.3 * len(rows)))
    axis = figure.subplots()
    image = axis.imshow(values, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=90)
    axis.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, label=label)
    axis.grid(False)
    save_figure(figure, path)
