"""The cells of examples/tour.ipynb run in order, and give what the notebook says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples/tour.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_notebook_is_stored_without_output():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert code
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []


@pytest.mark.slow
def test_notebook_trains_measures_certifies_packs_and_loads(tmp_path, monkeypatch):
    """A mock of IPython stores what the cells display."""
    shown: list[Any] = []
    updates: list[Any] = []

    def display(value: Any, display_id: bool = False) -> SimpleNamespace:
        shown.append(value)
        return SimpleNamespace(update=updates.append)

    mock: Any = ModuleType("IPython.display")
    mock.display, mock.SVG = display, lambda filename: ElementTree.parse(filename).getroot()
    monkeypatch.setitem(sys.modules, "IPython.display", mock)
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, {cell['id']}", "exec"), names)

    assert sum(parameter.numel() for parameter in names["model"].parameters() if parameter.requires_grad) == 200
    assert names["before"] < 0.7 < 0.8 < names["accuracy"]
    assert len(updates) == len(names["trials"]) == len(Path("runs/tour/d90/trials.jsonl").read_text().splitlines())
    assert 16 < names["result"].d < 1024
    certificate = names["certificate"]
    assert certificate.risk < certificate.bound < certificate.majority / certificate.n
    assert certificate.bits < 8 * len(names["data"]) < 8 * 150
    assert [ElementTree.iselement(value) for value in shown] == [False, False, True, True]
