"""The command `peft-intrinsic`: its options and messages. Torch and the package are imported by what is run."""

from __future__ import annotations

import argparse
import io
import linecache
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .others import add_commands, add_text_and_label, names


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Errors of the user's making end it with a message and the status 2."""
    parser = argparse.ArgumentParser(prog="peft-intrinsic", description="Measure, pack, certify, and learn subspaces.")
    parser.add_argument("--version", action="version", version=version("peft_intrinsic"))
    parser.add_argument("--debug", action="store_true", help="the whole traceback of every error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    measure = commands.add_parser("measure", help="d90 of a task for a model")
    measure.set_defaults(run=_measure)
    measure.add_argument("--model", required=True, help="name on the Hub, or folder")
    measure.add_argument("--method", default="did", help="did, said, default, lora, unilora or tinylora (did)")
    _add_options(measure)
    study = commands.add_parser("study", help="d90 of several models, or by several methods")
    study.set_defaults(run=_study)
    study.add_argument("kind", choices=["checkpoints", "models", "methods", "gap"])
    study.add_argument("models", nargs="+", metavar="MODEL", help="names on the Hub, or folders")
    study.add_argument(
        "--method", type=names, help="as of measure; several with commas for 'methods' (did,said; else did)"
    )
    _add_options(study)
    analyze = commands.add_parser("analyze", help="ask the trials of a run something else; nothing is trained")
    analyze.set_defaults(run=_analyze)
    analyze.add_argument("folder", metavar="RUN", help="folder of the run")
    analyze.add_argument("--out", help="folder of the new report (that of the run)")
    _add_question(analyze.add_argument, None)
    add_commands(commands)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        hint = "An option takes one value; several are joined by commas: --text sentence1,sentence2."
        parser.error(f"unrecognized arguments: {' '.join(unknown)}. {hint}")
    for stream in (sys.stdout, sys.stderr):  # ≤ is not in every code page
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        args.run(args)
    except KeyboardInterrupt:
        parser.exit(130, "\npeft-intrinsic: stopped. What was finished is kept: the same command goes on.\n")
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if args.debug or not _meant(error):
            raise
        parser.exit(2, f"peft-intrinsic: {error}\n")


def _meant(error: BaseException) -> bool:
    """Whether it is a message for the user: of a file or an import, or raised on purpose by this package."""
    if isinstance(error, (OSError, ImportError)):
        return True
    place = error.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    if place is None:
        return False
    file = place.tb_frame.f_code.co_filename
    ours = any(part.startswith("peft_intrinsic") for part in Path(file).parts)
    return ours and linecache.getline(file, place.tb_lineno).strip().startswith("raise")


def _rates(text: str) -> Any:
    try:
        return text if text == "auto" else [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'auto' nor rates such as 5e-5,2e-4,8e-4.") from None


def _dims(text: str) -> list[int]:
    try:
        low, high, points = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not lowest,highest,points.") from None
    return [low, high, points]


def _add_question(add: Any, default: bool | None) -> None:
    """What the trials are asked; without defaults, as the run asked."""
    known = default is not None
    add(
        "--dims",
        type=_dims,
        default="100,1000000,64" if known else None,
        help="grid: lowest, highest, points (100,1000000,64, as the paper)",
    )
    add("--target", type=float, default=0.9 if known else None, help="share to reach (0.9)")
    add(
        "--relative-to",
        choices=["score", "gain"],
        help="of the score, or of the gain over majority (score; of a loss: gain)",
    )
    add(
        "--center",
        choices=["median", "mean"],
        default="median" if known else None,
        help="of the seeds: the median of those that did not collapse, or the mean of all (median)",
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("task").add_argument
    add("--task", help="a task of GLUE from the Hub, such as glue/mrpc; or name files:")
    add("--train", help="CSV, TSV, JSON lines or Parquet; with --dataset a split, such as train")
    add("--eval", help="likewise, held out")
    add("--dataset", help="on the Hub, NAME or NAME:CONFIGURATION")
    add_text_and_label(add)
    add(
        "--metric",
        help="accuracy, f1, matthews, spearman for a regression; or any of evaluate by name or path, NAME:KEY where it "
        "gives several numbers (accuracy, or the task's own)",
    )
    add(
        "--task-type",
        default="SEQ_CLS",
        choices=["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM"],
        help="of the files: classes of texts, classes of words in lists, or the next token (SEQ_CLS)",
    )
    add = parser.add_argument_group("trials").add_argument
    add(
        "--full-learning-rates",
        type=_rates,
        default="auto",
        help="learning rates to try in full, 1e-5,3e-5,1e-4 (auto)",
    )
    add("--learning-rates", type=_rates, default="auto", help="… in the subspace, as many, 5e-5,2e-4,8e-4 (auto)")
    add("--epochs", type=float, default=3, help="of every trial (3)")
    add("--batch", type=int, default=32, help="batch size (32)")
    add("--max-length", type=int, default=128, help="tokens of an input (128)")
    add("--patience", type=int, help="epochs without a better score after which a trial stops")
    add("--config", help="YAML file with further TrainingArguments, which win over the options above")
    group = parser.add_argument_group("search")
    add = group.add_argument
    add("--out", required=True, help="folder of the run; the same command goes on where it stopped")
    add("--overwrite", action="store_true", help="discard the stored trials of a folder that is in use")
    add("--dry-run", action="store_true", help="check everything, print the plan, run nothing")
    _add_question(add, True)
    add("--seeds", type=int, default=3, help="of each d (3)")
    add("--baseline-seeds", type=int, help="of full fine-tuning (3, and more where they narrow the interval most)")
    add("--trials", type=int, help="budget of all trials (60; none with --sweep)")
    add("--minutes", type=float, help="nothing is begun later than this after the start")
    add("--sweep", action="store_true", help="measure the whole grid")
    add = parser.add_argument_group("where the trials run").add_argument
    add("--engine", default="process", choices=["process", "ray"], help="this process, or a Ray cluster (process)")
    add("--ray-address", help="of a running cluster; by default one is started on this machine")
    add("--cpus", type=float, default=1, help="Ray: CPUs of a trial (1)")
    add("--gpus", type=float, default=0, help="Ray: GPUs of a trial, or a share of one (0)")
    add(
        "--launch",
        help="run each trial through this, such as 'accelerate launch --num_processes 2 --main_process_port 0'",
    )


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Of transformers' Trainer."""
    arguments: dict[str, Any] = {
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch,
        "per_device_eval_batch_size": args.batch,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
    }
    if args.config:
        import yaml

        with open(args.config, encoding="utf-8") as file:
            try:
                more = yaml.safe_load(file) or {}
            except yaml.YAMLError as error:
                raise ValueError(f"--config {args.config} cannot be read: {error}") from None
        if not isinstance(more, dict):
            raise ValueError(f"--config {args.config} must hold names and values of TrainingArguments, not {more!r}.")
        arguments |= more
    return arguments


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """The question, as far as it was asked."""
    from peft_intrinsic.measure import grid

    found = {
        name: getattr(args, name) for name in ("target", "relative_to", "center") if getattr(args, name) is not None
    }
    if args.dims:
        try:
            found["dims"] = tuple(grid(*args.dims))
        except ValueError as error:
            raise ValueError(f"dims (--dims): {error}") from None
    return found


def _run(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `measure_text` and of `study`, but for model and method."""
    from peft_intrinsic.measure import RayEngine

    names = ("task", "train", "eval", "dataset", "label", "metric", "task_type", "max_length", "patience")
    options = {name: getattr(args, name) for name in names}
    plan = {name: getattr(args, name) for name in ("seeds", "baseline_seeds", "trials", "minutes", "sweep")}
    return {
        "options": {**options, "columns": tuple(args.text), "arguments": _arguments(args)},
        "question": {**_asked(args), **plan, "learning_rates": (args.full_learning_rates, args.learning_rates)},
        "out": args.out,
        "overwrite": args.overwrite,
        "dry_run": args.dry_run,
        "launcher": args.launch,
        "engine": (lambda: RayEngine(args.ray_address, args.cpus, args.gpus)) if args.engine == "ray" else None,
    }


def _extras() -> Any:
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401

        import peft_intrinsic.measure.measure_text
        import peft_intrinsic.measure.report
    except ImportError as error:
        from peft_intrinsic.version import pip_install

        raise RuntimeError(f"{error}. {pip_install('[measure]')}") from None
    return peft_intrinsic.measure


def _measure(args: argparse.Namespace) -> None:
    measure = _extras()
    run = _run(args)
    run["options"] |= {"model": args.model, "method": args.method}
    if result := measure.measure_text.measure_text(**run):
        _tell(result, args.out, args.model)


def _analyze(args: argparse.Namespace) -> None:
    measure = _extras()
    result = measure.analyze(args.folder, **_asked(args))
    out = args.out or args.folder
    measure.write_report(result, out)
    _tell(result, out)


def _tell(result: Any, out: str, model: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    from peft_intrinsic.measure.report import advice, score_and_target, summary
    from peft_intrinsic.text.training import load_without_weights

    print(summary(result))
    print(score_and_target(result))
    if told := advice(
        result, load_without_weights(model, result.settings["task_type"]).num_parameters() if model else None
    ):
        print(told)
    table = Table("d", "monotone fit", "scores by seed")
    for point in result.points:
        fitted = "" if point.fit is None else f"{point.fit:.4f}"
        style = "bold" if point.d == result.d else ""
        table.add_row(str(point.d), fitted, " ".join(f"{score:.4f}" for score in point.scores), style=style)
    Console().print(table)
    print(f"report.json, report.md, curve.csv and curve.png, .svg, .pdf in {out}")


def _study(args: argparse.Namespace) -> None:
    _extras()
    from peft_intrinsic.measure.study import study

    methods = args.method or (["did", "said"] if args.kind == "methods" else ["did"])
    if study(args.kind, args.models, methods, **_run(args)):
        print(f"study.json, study.md, study.csv and study.png, .svg, .pdf in {args.out}, with a folder for each run")
