"""Figures are plotted without pyplot, so that a notebook keeps its backend."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from peft_intrinsic import figures
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


@pytest.mark.skipif(find_spec("opacus") is None, reason="opacus is not installed")
def test_figure_of_private_training_shows_the_range_of_the_seeds_at_the_best_learning_rate(monkeypatch):
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(benchmarks)
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    plot = runpy.run_path(str(benchmarks / "private.py"))["plot"]
    names = ("name", "epsilon", "lr", "seed", "accuracy", "loss")
    runs = [
        ("head", 8.0, 0.016, 0, 0.70, 0.70),  # the lower cross-entropy counts
        ("head", 8.0, 0.064, 0, 0.64, 0.62),
        ("head", 8.0, 0.064, 1, 0.68, 0.60),
        ("head", 1.0, 0.064, 0, 0.63, 0.64),
        ("head", 1.0, 0.016, 0, 0.90, 0.10),
        ("head", None, 0.064, 0, 0.65, 0.61),
        ("d=64", 1.0, 0.064, 0, 0.90, 0.10),  # not tuned yet
        ("LoRA r=8, head from label names", 8.0, 0.004, 0, 0.80, 0.50),  # no other cell yet
    ]
    plot([dict(zip(names, run, strict=True)) for run in runs])
    expected = [
        [[(0.63, 0.63), (0.64, 0.68)], [(0.65, 0.65)], [(0.80, 0.80)]],
        [[(0.64, 0.64), (0.60, 0.62)], [(0.61, 0.61)], [(0.50, 0.50)]],
    ]
    for axes, ranges in zip(drawn[0].axes, expected, strict=True):
        for container, ends in zip(axes.containers, ranges, strict=True):
            line, _, (collection,) = container.lines
            found = [(low, high) for (_, low), (_, high) in collection.get_segments()]
            assert found == [pytest.approx(pair) for pair in ends]
            assert list(line.get_ydata()) == pytest.approx([sum(pair) / 2 for pair in ends])
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0.5", "1", "3", "8", "no noise"]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["head alone", "LoRA (r = 8), head from names"]
