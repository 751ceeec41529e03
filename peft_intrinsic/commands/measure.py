"""The commands measure, advise, study and analyze."""

from __future__ import annotations

import argparse
from typing import Any

import matplotlib  # noqa: F401 - of the reports: missing packages are reported before hours of training
import yaml
from rich.console import Console
from rich.table import Table

from ..measure import RayEngine, grid, write_report
from ..measure import analyze as analyze_trials
from ..measure.advise import advise as run_advise
from ..measure.measure_text import measure_text
from ..measure.report import describe_target, suggest_grid, summarize
from ..measure.study import study as run_study
from ..text.training import load_without_weights
from .inputs import build_text_options


def measure(args: argparse.Namespace) -> None:
    """Measure the d90 of a task, and print the result."""
    run = _run_options(args)
    run["options"] |= {"model": args.model, "method": args.method}
    if result := measure_text(**run):
        _print_result(result, args.out, args.model)


def advise(args: argparse.Namespace) -> None:
    """Measure the smallest LoRA rank and the smallest d, and print the advice."""
    run = _run_options(args)
    run["options"] |= {"model": args.model}
    if advice := run_advise(ranks=args.ranks, **run):
        print(advice.report() + f"advice.json and advice.md in {args.out}, with a folder for each measurement")


def study(args: argparse.Namespace) -> None:
    """Measure several models or methods."""
    methods = args.method or (["did", "said"] if args.kind == "methods" else ["did"])
    if run_study(args.kind, args.models, methods, **_run_options(args)):
        print(f"study.json, study.md, study.csv and study.png, .svg, .pdf in {args.out}, with a folder for each run")


def analyze(args: argparse.Namespace) -> None:
    """Re-analyze the stored trials of a run, and print the result."""
    result, out = analyze_trials(args.folder, **_question(args)), args.out or args.folder
    write_report(result, out)
    _print_result(result, out)


def _run_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `measure_text` and of `run_study`, without the model and the method."""
    plan = {name: getattr(args, name) for name in ("seeds", "baseline_seeds", "trials", "minutes", "sweep")}
    return {
        "options": {**build_text_options(args, _read_config(args.config)), "patience": args.patience},
        "plan": {**_question(args), **plan, "learning_rates": (args.full_learning_rates, args.learning_rates)},
        "out": args.out,
        "overwrite": args.overwrite,
        "dry_run": args.dry_run,
        "launcher": args.launch,
        "engine": (lambda: RayEngine(args.ray_address, args.cpus, args.gpus)) if args.engine == "ray" else None,
    }


def _question(args: argparse.Namespace) -> dict[str, Any]:
    """The options that define d90, as far as they are given."""
    names = ("target", "relative_to", "center")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.dims:
        try:
            given["dims"] = tuple(grid(*args.dims))
        except ValueError as error:
            raise ValueError(f"dims (--dims): {error}") from None
    return given


def _read_config(path: str | None) -> dict[str, Any]:
    """Further TrainingArguments from a YAML file."""
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        try:
            arguments = yaml.safe_load(file) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"--config {path} must hold names and values of TrainingArguments, not {arguments!r}.")
    return arguments


def _print_result(result: Any, out: str, model: str | None = None) -> None:
    print(summarize(result))
    print(describe_target(result))
    weights = load_without_weights(model, result.settings["task_type"]).num_parameters() if model else None
    if hint := suggest_grid(result, weights):
        print(hint)
    table = Table("d", "monotone fit", "scores by seed")
    for point in result.points:
        fitted = "" if point.fit is None else f"{point.fit:.4f}"
        style = "bold" if point.d == result.d else ""
        table.add_row(str(point.d), fitted, " ".join(f"{score:.4f}" for score in point.scores), style=style)
    Console().print(table)
    print(f"report.json, report.md, curve.csv and curve.png, .svg, .pdf in {out}")
