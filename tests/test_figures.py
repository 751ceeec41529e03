"""Figures are plotted without pyplot, so that a notebook keeps its backend."""

import sys

import matplotlib
import pytest

from peft_intrinsic.analysis import CriticalLayers
from peft_intrinsic.analysis.heat_map import heat_map
from peft_intrinsic.bounds.sweep import plot_sweep


def draw_heat_map(path):
    heat_map({("layer 0", "weight"): 0.5}, "share", path)


def draw_sweep(path):
    counts = {"bound": 0.4, "risk": 0.2, "test_n": 10, "test_errors": 3, "majority": 5, "n": 10}
    plot_sweep([{"d": 10, "bytes": 40, "certificate": counts}], path)


def draw_critical_layers(path):
    parts, values = ["layer 0", "layer 1"], [0.8, 0.85]
    CriticalLayers(0.9, parts, values, [10, 10], values, 0.01).plot(path)


@pytest.mark.parametrize("draw", [draw_heat_map, draw_sweep, draw_critical_layers])
def test_plotting_a_figure_does_not_change_the_backend_of_the_process(draw, tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib, "use", lambda *_: pytest.fail("the backend was changed"))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("draw", [draw_heat_map, draw_sweep, draw_critical_layers])
def test_a_figure_is_the_same_file_at_each_call_and_for_any_style_of_the_caller(draw, tmp_path):
    draw(tmp_path / "first.svg")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        draw(tmp_path / "second.svg")
        assert matplotlib.rcParams["font.size"] == 30
    first, second = ((tmp_path / f"{name}.svg").read_bytes() for name in ("first", "second"))
    assert first == second
    assert b"<text" in first  # letters can be searched and read aloud
