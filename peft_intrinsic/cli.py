"""The command `peft-intrinsic`."""

from __future__ import annotations

import argparse
from typing import Any

from .version import __version__


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Errors of the user's making end it with a message and the status 2."""
    parser = argparse.ArgumentParser(prog="peft-intrinsic", description="Measure the intrinsic dimension of a task.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_measure(commands.add_parser("measure", help="d90 of a task for a model"))
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(2, f"peft-intrinsic: {error}\n")


def _rates(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _add_measure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.set_defaults(run=_measure)
    add("--model", required=True, help="name on the Hub, or folder")
    add("--task", help="a task of GLUE from the Hub, such as glue/mrpc; or name files:")
    add("--train", help="CSV, TSV, JSON lines or Parquet")
    add("--eval", help="likewise, held out")
    add("--text", nargs="+", default=["text"], help="column of the text, or two for pairs (text)")
    add("--label", default="label", help="column of the label (label)")
    add("--metric", default="accuracy", help="accuracy, f1, matthews, or spearman for a regression (accuracy)")
    add("--said", action="store_true", help="a learned scale per layer, counted inside d")
    add("--out", required=True, help="folder of the run; the same command goes on where it stopped")
    add("--fresh", action="store_true", help="begin anew in a folder that is in use")
    add("--dims", default="100,1000000,64", help="grid: lowest, highest, points (100,1000000,64: the paper's)")
    add("--target", type=float, default=0.9, help="share to reach (0.9)")
    add("--of", default="score", choices=["score", "gain"], help="share of the score, or of the gain over the majority")
    add("--seeds", type=int, default=3, help="of each d and of full fine-tuning (3)")
    add("--trials", type=int, help="budget")
    add("--minutes", type=float, help="budget")
    add("--sweep", action="store_true", help="measure the whole grid")
    add("--full-rates", type=_rates, default=[1e-5, 3e-5, 1e-4], help="learning rates to try in full (1e-5,3e-5,1e-4)")
    add("--rates", type=_rates, default=[0.02, 0.05, 0.1], help="… and in the subspace, as many (0.02,0.05,0.1)")
    add("--epochs", type=float, default=3, help="of every trial (3)")
    add("--batch", type=int, default=32, help="batch size (32)")
    add("--max-length", type=int, default=128, help="tokens of an input (128)")
    add("--patience", type=int, help="epochs without a better score after which a trial stops")
    add("--config", help="YAML file with further TrainingArguments, which win over the options above")


def _measure(args: argparse.Namespace) -> None:
    from .measure import grid, measure_intrinsic_dimension, write_report
    from .measure.report import summary

    try:
        from rich.console import Console
        from rich.table import Table

        from .measure.text import TextFit, files, glue
    except ImportError as error:
        raise RuntimeError(f"{error}. pip install peft_intrinsic[measure]") from None
    if (args.task is None) == (args.train is None or args.eval is None):
        raise ValueError("name either --task, or both --train and --eval.")
    task = glue(args.task) if args.task else files(args.train, args.eval, args.text, args.label, args.metric)
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
            arguments |= yaml.safe_load(file) or {}
    fit = TextFit(args.model, task, args.said, args.max_length, args.patience, arguments)
    result = measure_intrinsic_dimension(
        fit,
        grid(*(int(part) for part in args.dims.split(","))),
        target=args.target,
        of=args.of,
        majority=task.majority(),
        seeds=args.seeds,
        learning_rates=(args.full_rates, args.rates),
        trials=args.trials,
        minutes=args.minutes,
        sweep=args.sweep,
        out=args.out,
        fresh=args.fresh,
        settings={
            "model": args.model,
            "task": args.task or [args.train, args.eval],
            "columns": list(task.columns),
            "metric": task.metric,
            "said": args.said,
            "max_length": args.max_length,
            "patience": args.patience,
            "arguments": arguments,
        },
    )
    write_report(result, args.out)
    print(summary(result))
    table = Table("d", "monotone fit", "scores by seed")
    for d, fitted, scores in result.points:
        style = "bold" if d == result.d else ""
        table.add_row(str(d), f"{fitted:.4f}", " ".join(f"{score:.4f}" for score in scores), style=style)
    Console().print(table)
    print(f"report.json, report.md and curve.png in {args.out}")
