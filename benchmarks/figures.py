"""Plots the stored rows as the SVG files of benchmarks/results, docs/bank_training.svg and docs/private.svg.

    python benchmarks/figures.py

Nothing is trained. `python benchmarks/quality.py plot FILE.svg` plots the quality of methods.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import bank_training
import pretraining
import private
import supermask
import trajectory
from quality import read_rows
from studies import Methods

from peft_intrinsic.analysis import CriticalLayers
from peft_intrinsic.analysis.distance import MEASURES
from peft_intrinsic.analysis.heat_map import heat_map
from peft_intrinsic.bounds.sweep import plot_sweep
from peft_intrinsic.measure import analyze
from peft_intrinsic.measure.report import plot_curve
from peft_intrinsic.measure.study import plot_study
from peft_intrinsic.tuner.names import block_of, kind_of

RESULTS = Path(__file__).parent / "results"
TITLES = {"sst2": "SST-2", "mrpc": "MRPC"}


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def draw_svg(draw: Callable[[Path], None], file: Path) -> None:
    """Keep only the SVG of a figure that is saved in several formats."""
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
        file.write_bytes(Path(folder, file.name).read_bytes())


def draw_measurements() -> None:
    """Draw the curves of d90/ and digits/, and the studies."""
    for plan in sorted(RESULTS.glob("d90/*/*/plan.json")):
        draw_curve(plan.parent, {"task": TITLES[plan.parts[-3]]})
    for file in sorted(RESULTS.glob("d90/*/study.json")):
        study = read(file)
        rows = [{**row, "relative_to": row.get("relative_to", row.get("of"))} for row in study["rows"]]  # former name
        rows = [{**row, "task": TITLES[file.parent.name]} for row in rows]
        draw_svg(lambda folder, rows=rows, kind=study["kind"]: plot_study(kind, rows, folder), file.with_suffix(".svg"))
    for plan in sorted(RESULTS.glob("digits/*/plan.json")):
        network = f"two hidden layers of {plan.parent.name}"
        draw_curve(plan.parent, {"model": network, "task": "digits", "metric": "accuracy"})


def draw_curve(folder: Path, settings: dict[str, str]) -> None:
    """Draw the curve of a measurement, with names for readers in place of some settings."""
    result = analyze(folder)
    result = replace(result, settings={**result.settings, **settings})
    draw_svg(lambda out: plot_curve(result, out, "curve"), folder / "curve.svg")


def draw_closeness(folder: Path) -> None:
    """Draw critical layers and distances."""
    critical = read(folder / "critical.json")
    critical.setdefault("cumulative_scores", critical.get("together"))  # former name
    values = {field.name: critical[field.name] for field in fields(CriticalLayers)}
    CriticalLayers(**values).plot(folder / "critical.svg")
    tensors = read(folder / "distance.json")["tensor"]
    cells = {(block_of(name) or "rest", kind_of(name)): row["angular"] for name, row in tensors.items()}
    heat_map(cells, MEASURES["angular"], folder / "distance.svg")


def main() -> None:
    draw_measurements()
    for file in sorted(RESULTS.glob("certificates/*/sweep.json")):
        plot_sweep(read(file)["rows"], file.with_name("certificates.svg"))
    for file in sorted(RESULTS.glob("closeness/*/critical.json")):
        draw_closeness(file.parent)
    for study in (supermask, trajectory):
        methods = Methods(study.__name__, study.list_methods, study.NAMES, ())
        for file in sorted(methods.folder.glob("*/trials.jsonl")):
            methods.plot(file.parent.name)
    for file in sorted(RESULTS.glob("pretraining/*/study.json")):
        pretraining.plot(file.parent.name)
    for benchmark in (bank_training, private):
        benchmark.plot(read_rows(benchmark.RESULTS))


if __name__ == "__main__":
    main()
