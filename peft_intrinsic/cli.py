"""The command `peft-intrinsic`."""

from __future__ import annotations

import argparse
from typing import Any

from .commands import add_commands
from .measure.curve import grid
from .version import __version__


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Errors of the user's making end it with a message and the status 2."""
    parser = argparse.ArgumentParser(prog="peft-intrinsic", description="Measure, pack, certify, and learn subspaces.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    measure = commands.add_parser("measure", help="d90 of a task for a model")
    measure.set_defaults(run=_measure)
    measure.add_argument("--model", required=True, help="name on the Hub, or folder")
    measure.add_argument("--said", action="store_true", help="a learned scale per layer, counted inside d")
    _add_options(measure)
    study = commands.add_parser("study", help="d90 of several models, or by both methods")
    study.set_defaults(run=_study)
    study.add_argument("kind", choices=["checkpoints", "models", "methods", "gap"])
    study.add_argument("models", nargs="+", metavar="MODEL", help="names on the Hub, or folders")
    study.add_argument("--said", action="store_true", help="measure by SAID ('methods' measures by both)")
    _add_options(study)
    add_commands(commands)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        parser.exit(2, f"peft-intrinsic: {error}\n")


def _rates(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _dims(text: str) -> list[int]:
    try:
        low, high, points = map(int, text.split(","))
        return grid(low, high, points)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("task").add_argument
    add("--task", help="a task of GLUE from the Hub, such as glue/mrpc; or name files:")
    add("--train", help="CSV, TSV, JSON lines or Parquet")
    add("--eval", help="likewise, held out")
    add("--text", nargs="+", default=["text"], help="column of the text, or two for pairs (text)")
    add("--label", default="label", help="column of the label (label)")
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
    add("--full-rates", type=_rates, default=[1e-5, 3e-5, 1e-4], help="learning rates to try in full (1e-5,3e-5,1e-4)")
    add("--rates", type=_rates, default=[5e-5, 2e-4, 4e-4], help="… in the subspace, as many (5e-5,2e-4,4e-4)")
    add("--epochs", type=float, default=3, help="of every trial (3)")
    add("--batch", type=int, default=32, help="batch size (32)")
    add("--max-length", type=int, default=128, help="tokens of an input (128)")
    add("--patience", type=int, help="epochs without a better score after which a trial stops")
    add("--config", help="YAML file with further TrainingArguments, which win over the options above")
    add = parser.add_argument_group("search").add_argument
    add("--out", required=True, help="folder of the run; the same command goes on where it stopped")
    add("--fresh", action="store_true", help="begin anew in a folder that is in use")
    add(
        "--dims",
        type=_dims,
        default="100,1000000,64",
        help="grid: lowest, highest, points (100,1000000,64, as the paper)",
    )
    add("--target", type=float, default=0.9, help="share to reach (0.9)")
    add("--of", choices=["score", "gain"], help="of the score, or of the gain over majority (score; of a loss: gain)")
    add("--seeds", type=int, default=3, help="of each d and of full fine-tuning (3)")
    add("--trials", type=int, help="budget of the search; learning rates and full fine-tuning are not counted")
    add("--minutes", type=float, help="no d is begun later than this after the start")
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


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Of the trials."""
    if (args.task is None) == (args.train is None or args.eval is None):
        raise ValueError("name either --task, or both --train and --eval.")
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
    names = ("task", "train", "eval", "label", "metric", "task_type", "said", "max_length", "patience")
    found = {name: getattr(args, name) for name in names}
    return {**found, "columns": args.text, "arguments": arguments, "train_score": False}


def _search(args: argparse.Namespace) -> dict[str, Any]:
    from .measure import RayEngine

    return {
        "dims": args.dims,
        "learning_rates": (args.full_rates, args.rates),
        "engine": RayEngine(args.ray_address, args.cpus, args.gpus) if args.engine == "ray" else None,
        "launcher": args.launch,
        **{name: getattr(args, name) for name in ("target", "of", "seeds", "trials", "minutes", "sweep", "fresh")},
    }


def _measure(args: argparse.Namespace) -> None:
    try:
        from rich.console import Console
        from rich.table import Table

        from .measure.command import measure_text
        from .measure.report import summary
    except ImportError as error:
        raise RuntimeError(f"{error}. pip install peft_intrinsic[measure]") from None
    result = measure_text({**_options(args), "model": args.model}, args.out, **_search(args))
    print(summary(result))
    table = Table("d", "monotone fit", "scores by seed")
    for d, fitted, scores in result.points:
        style = "bold" if d == result.d else ""
        table.add_row(str(d), f"{fitted:.4f}", " ".join(f"{score:.4f}" for score in scores), style=style)
    Console().print(table)
    print(f"report.json, report.md and curve.png in {args.out}")


def _study(args: argparse.Namespace) -> None:
    try:
        from .measure.study import study
    except ImportError as error:
        raise RuntimeError(f"{error}. pip install peft_intrinsic[measure]") from None
    study(args.kind, args.models, _options(args), args.out, **_search(args))
    print(f"study.json, study.md and study.png in {args.out}, with a folder for each measurement")
