"""Figures are plotted without pyplot, so that a notebook keeps its backend."""

import sys

import matplotlib
import pytest
from matplotlib.figure import Figure

from peft_intrinsic.analysis import CriticalLayers
from peft_intrinsic.analysis.heat_map import heat_map
from peft_intrinsic.bounds.sweep import plot_sweep
from peft_intrinsic.figures import scale_counts
from peft_intrinsic.text.methods import METHODS, TITLES


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


@pytest.mark.parametrize(("ends", "expected"), [((60, 2400), [100, 200, 500, 1000, 2000]), ((12, 15), None)])
def test_axis_of_counts_has_labels_without_exponents_that_are_its_values(ends, expected):
    figure = Figure()
    axes = figure.subplots()
    axes.set_xlim(ends)
    scale_counts(axes)
    figure.draw_without_rendering()
    ticks = [label for minor in (False, True) for label in axes.get_xticklabels(minor=minor) if label.get_text()]
    values = {label.get_text(): label.get_position()[0] for label in ticks}
    shown = {text: value for text, value in values.items() if ends[0] <= value <= ends[1]}
    assert len(shown) > 1
    assert {text: float(text.replace(",", "")) for text in shown} == pytest.approx(shown, rel=1e-9)
    assert expected is None or list(shown.values()) == expected


def test_every_method_has_a_name_for_figures():
    assert TITLES.keys() == METHODS.keys()
